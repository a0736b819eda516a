"""Shards on disk: they are read as written, and damage is detected."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import PAIRS_PER_SEED, noise_from_seeds, pair_seed
from diffusion2gan.pairs import store
from diffusion2gan.pairs.check import verify
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec, read_shard, shard_path

SPEC = PairsSpec(
    teacher="t",
    revision="r",
    prompts="p",
    count=10,
    seed=3,
    num_inference_steps=5,
    guidance_scale=3.0,
    latent_shape=(4, 2, 3),
    shard_size=4,
)


def some_pairs(spec: PairsSpec, indices: range) -> Pairs:
    seeds = [pair_seed(spec.seed, i) for i in indices]
    latents = noise_from_seeds(seeds, spec.latent_shape)
    return Pairs(list(indices), seeds, [f"prompt “{i}” ✓" for i in indices], latents)


def write_set(folder: Path, spec: PairsSpec = SPEC) -> None:
    store.start_set(folder, spec)
    for shard in range(spec.num_shards):
        pairs = some_pairs(spec, spec.shard_indices(shard))
        store.write_shard(folder, shard, spec, pairs, pairs.latents if spec.keep_noise else None)


def test_shards_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ROW_GROUP", 3)
    write_set(tmp_path)
    assert [len(SPEC.shard_indices(s)) for s in range(SPEC.num_shards)] == [4, 4, 2]
    for shard in range(3):
        found, made = read_shard(tmp_path, shard), some_pairs(SPEC, SPEC.shard_indices(shard))
        assert (found.index, found.seed, found.prompts) == (made.index, made.seed, made.prompts)
        assert found.latents.dtype == torch.float32 and torch.equal(
            found.latents, made.latents.half().float()
        )
    assert verify(tmp_path) == []


def test_a_shard_is_readable_by_pyarrow_alone(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, keep_noise=True)
    write_set(tmp_path, spec)
    table = pq.read_table(shard_path(tmp_path, 2))
    described = json.loads(table.schema.metadata[b"diffusion2gan"])
    assert described == dataclasses.asdict(spec) | {"latent_shape": [4, 2, 3]}
    assert table["index"].to_pylist() == [8, 9]
    for row in table.to_pylist():
        latents = np.frombuffer(row["latents"], np.float16).reshape(4, 2, 3)
        noise = (
            torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(row["seed"]))
            .half()
            .numpy()
        )
        assert np.array_equal(latents, noise) and row["noise"] == row["latents"]
    assert "noise" not in pq.read_schema(_written(tmp_path / "plain")).names


def _written(folder: Path) -> Path:
    write_set(folder)
    return shard_path(folder, 0)


def test_a_truncated_shard_is_a_failure(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = shard_path(tmp_path, 1)
    content = path.read_bytes()
    for length in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(Failure, match=r"pairs-00001\.parquet is damaged.*move it away"):
            read_shard(tmp_path, 1)
        assert len(verify(tmp_path)) == 1


def test_every_flipped_byte_is_detected_or_harmless(tmp_path: Path) -> None:
    """Harmless: a byte outside of the pairs' data, such as the name of the writing library."""
    write_set(tmp_path)
    path = shard_path(tmp_path, 0)
    content, made = path.read_bytes(), read_shard(tmp_path, 0)
    latents_at = pq.ParquetFile(path).metadata.row_group(0).column(3)
    pages = range(
        latents_at.data_page_offset, latents_at.data_page_offset + latents_at.total_compressed_size
    )
    num_noticed = 0
    for position in range(0, len(content), 3):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 0x15]) + content[position + 1 :]
        )
        try:
            found = read_shard(tmp_path, 0)
        except (Failure, UserError):
            num_noticed += 1
        else:
            assert (found.index, found.seed, found.prompts) == (
                made.index,
                made.seed,
                made.prompts,
            ), position
            assert torch.equal(found.latents, made.latents), position
    path.write_bytes(
        content[: pages.stop - 1] + bytes([content[pages.stop - 1] ^ 1]) + content[pages.stop :]
    )
    assert len(verify(tmp_path)) == 1 and "damaged" in verify(tmp_path)[0]
    assert num_noticed > len(pages) // 3


def test_verify_finds_wrong_order_bad_numbers_duplicates_and_missing_shards(tmp_path: Path) -> None:
    write_set(tmp_path)
    made = some_pairs(SPEC, range(4, 8))
    store.write_shard(tmp_path, 1, SPEC, made.rows([1, 0, 2, 3]))
    assert ["its pairs are not 4…7" in problem for problem in verify(tmp_path)] == [True]
    bad = dataclasses.replace(
        made, latents=made.latents.clone().index_fill_(0, torch.tensor([2]), float("nan"))
    )
    store.write_shard(tmp_path, 1, SPEC, bad)
    assert ["not finite" in problem for problem in verify(tmp_path)] == [True]
    with pytest.raises(Failure, match=r"latents of 1 of 4 pairs \(such as pair 6\) are not finite"):
        next(PairReader(tmp_path, 0).batches(2))
    with pytest.raises(Failure, match="not finite"):
        PairReader(tmp_path, 0).first(8)
    store.write_shard(tmp_path, 1, SPEC, some_pairs(SPEC, range(0, 4)))
    assert any("also belong to another pair" in problem for problem in verify(tmp_path))
    shard_path(tmp_path, 1).unlink()
    assert ["is missing" in problem for problem in verify(tmp_path)] == [True]


def test_a_shard_of_another_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    write_set(tmp_path / "b", dataclasses.replace(SPEC, guidance_scale=8.0))
    shard_path(tmp_path / "b", 0).replace(shard_path(tmp_path / "a", 0))
    with pytest.raises(Failure, match="belongs to another set"):
        read_shard(tmp_path / "a", 0)


def test_continuing_a_set_with_other_settings_is_refused(tmp_path: Path) -> None:
    store.start_set(tmp_path, SPEC)
    store.start_set(tmp_path, SPEC)
    assert store.open_set(tmp_path) == SPEC
    with pytest.raises(
        UserError,
        match=r"guidance_scale: 3\.0 in the folder, 8\.0 requested; "
        r"shard_size: 4 in the folder, 5 requested",
    ):
        store.start_set(tmp_path, dataclasses.replace(SPEC, guidance_scale=8.0, shard_size=5))


def test_a_folder_without_a_valid_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no pairs \(pairs\.json is missing\)"):
        store.open_set(tmp_path)
    for content in ("{}", "[]", "3", '{"latent_shape": 4}', '{"latent_shape": [4, 2, 3]}', "{"):
        (tmp_path / "pairs.json").write_text(content)
        with pytest.raises(UserError, match=r"does not describe a set|is not JSON"):
            store.open_set(tmp_path)


def test_pair_seeds_are_unique_and_have_32_bits() -> None:
    ends = [0, 1, PAIRS_PER_SEED - 1]
    seeds = [pair_seed(s, i) for s in range(256) for i in ends]
    assert len(set(seeds)) == len(seeds) and min(seeds) == 0 and max(seeds) == 2**32 - 1
    assert pair_seed(7, 5) + 1 == pair_seed(7, 6)
    for bad in (-1, 256):
        with pytest.raises(UserError, match=f"--seed {bad}"):
            pair_seed(bad, 0)
    for bad in (-1, PAIRS_PER_SEED):
        with pytest.raises(UserError, match=f"pair {bad}"):
            pair_seed(0, bad)


def test_noise_depends_on_the_pairs_seed_alone() -> None:
    seeds, shape = [pair_seed(2, i) for i in (0, 1, 2**24 - 1)], (4, 8, 8)
    together = noise_from_seeds(seeds, shape)
    for seed, noise in zip(seeds, together, strict=True):
        assert torch.equal(noise, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(noise, noise_from_seeds([seed], shape)[0])
    assert together.dtype == torch.float32 and not torch.equal(together[0], together[1])


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.start_set(tmp_path, SPEC)

    def half(table: object, where: Path, **options: object) -> None:
        Path(where).write_bytes(b"half a sha")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(KeyboardInterrupt):
        store.write_shard(tmp_path, 0, SPEC, some_pairs(SPEC, range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]


def test_no_message_advises_deleting_a_shard_that_may_be_good(tmp_path: Path) -> None:
    # One digit of pairs.json: the shards are good
    write_set(tmp_path)
    spec_file = tmp_path / "pairs.json"
    original = spec_file.read_text()
    spec_file.write_text(original.replace('"seed": 3', '"seed": 8'))
    with pytest.raises(Failure) as raised:
        read_shard(tmp_path, 0)
    assert "(seed: 3 in the shard, 8 in pairs.json)" in str(raised.value)
    assert "restore it" in str(raised.value)
    spec_file.write_text(original)

    # An error of the operating system
    shard_path(tmp_path, 1).unlink()
    shard_path(tmp_path, 1).symlink_to(shard_path(tmp_path, 1))
    with pytest.raises(Failure, match=r"00001\.parquet cannot be read \(.*may be intact") as loop:
        read_shard(tmp_path, 1)

    # Damage
    shard_path(tmp_path, 2).write_bytes(shard_path(tmp_path, 2).read_bytes()[:-20])
    with pytest.raises(Failure, match=r"00002\.parquet is damaged") as damage:
        read_shard(tmp_path, 2)
    for error in (raised, loop, damage):
        assert "delete" not in str(error.value).lower()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", 0),
        ("count", -1),
        ("count", 10**11),
        ("count", "24"),
        ("count", 24.0),
        ("count", True),
        ("count", None),
        ("shard_size", 0),
        ("shard_size", -4),
        ("shard_size", "4"),
        ("seed", 256),
        ("seed", -1),
        ("num_inference_steps", 0),
        ("guidance_scale", "3"),
        ("guidance_scale", -1.0),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("latent_shape", [4, 2]),
        ("latent_shape", [4, 2, 0]),
        ("latent_shape", [4, 2, "3"]),
        ("latent_shape", [4, 2, 10**9]),
        ("keep_noise", 1),
        ("teacher", 3),
        ("prompts", None),
        ("negative_prompt", ["a"]),
        ("dtype", "float32"),
        ("format", 2),
    ],
)
def test_values_that_no_set_has_are_refused(key: str, value: object, tmp_path: Path) -> None:
    write_set(tmp_path)
    values = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(UserError, match=rf"pairs\.json does not describe .*{key} = "):
        verify(tmp_path)
    with pytest.raises(UserError, match=rf"pairs\.json does not describe .*{key} = "):
        PairReader(tmp_path, 0)


def test_shard_under_another_name_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write_set(tmp_path)
    shard_path(tmp_path, 1).write_bytes(shard_path(tmp_path, 0).read_bytes())
    with pytest.raises(
        Failure, match=r"00001\.parquet .*its pairs are not 4…7 \(first index \[0\]"
    ):
        read_shard(tmp_path, 1)
    read_shard(tmp_path, 0)

    # Seeds and prompts
    pairs = some_pairs(SPEC, range(4, 8))
    wrong_seed = dataclasses.replace(pairs, seed=[*pairs.seed[:3], 5])
    no_prompt = dataclasses.replace(pairs, prompts=[*pairs.prompts[:3], None])
    for changed, message in ((wrong_seed, "its pairs are not 4…7"), (no_prompt, "no prompt")):
        store.write_shard(tmp_path, 1, SPEC, changed)
        with pytest.raises(Failure, match=message):
            read_shard(tmp_path, 1)
        assert any(message in problem for problem in verify(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads in /proc")
def test_reading_in_a_thread_starts_no_further_openmp_team(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a team makes OpenMP's threads sleep between operations, for the rest of the process."""
    spec = dataclasses.replace(SPEC, latent_shape=(64, 64, 64), count=4)
    write_set(tmp_path, spec)

    # The reader of Parquet starts threads of its own when it likes, so it reads before they count
    table = store.read_table(tmp_path, 0, spec)
    monkeypatch.setattr(store, "read_table", lambda folder, shard, spec: table)

    def count_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def count_after_read(shard: int) -> int:
        read_shard(tmp_path, shard, spec=spec, dtype=torch.float16)
        return count_threads()

    before = count_threads()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(count_after_read, 0).result() == before + 1
    finally:
        torch.set_num_threads(num_threads)
