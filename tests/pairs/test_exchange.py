"""Merging folders into a set; export to and import from WebDataset."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs import store
from diffusion2gan.pairs.check import verify
from diffusion2gan.pairs.exchange import export_webdataset, import_webdataset, merge, tar_name
from diffusion2gan.pairs.store import Pairs, PairsSpec, read_shard, shard_path

SPEC = PairsSpec("t", "r", "p", 10, 3, 5, 3.0, (4, 2, 3), 4, keep_noise=True)


def write(folder: Path, shards: range, spec: PairsSpec = SPEC) -> Path:
    store.start_set(folder, spec)
    for shard in shards:
        seeds = [pair_seed(spec.seed, i) for i in spec.shard_indices(shard)]
        noise = noise_from_seeds(seeds, spec.latent_shape)
        prompts = [f"prompt “{i}” ✓" for i in spec.shard_indices(shard)]
        pairs = Pairs(list(spec.shard_indices(shard)), seeds, prompts, -noise)
        store.write_shard(folder, shard, spec, pairs, noise)
    return folder


def contents(folder: Path) -> list[dict[str, object]]:
    return [row for shard in range(3) for row in store.read_table(folder, shard, SPEC).to_pylist()]


def test_folders_with_some_shards_are_merged_into_the_set(tmp_path: Path) -> None:
    complete = write(tmp_path / "complete", range(3))
    a, b = write(tmp_path / "a", range(0, 2)), write(tmp_path / "b", range(1, 3))
    assert merge([a], tmp_path / "out") == (2, 3)
    assert merge([a, b], tmp_path / "out") == (3, 3) == merge([b, a], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(complete) and verify(tmp_path / "out") == []


def test_merge_refuses_different_sets_and_damaged_or_misnamed_shards(tmp_path: Path) -> None:
    a = write(tmp_path / "a", range(1))
    b = write(tmp_path / "b", range(1, 3), dataclasses.replace(SPEC, guidance_scale=8.0))
    with pytest.raises(UserError, match=r"different sets \(guidance_scale: 3\.0 and 8\.0\)"):
        merge([a, b], tmp_path / "out")
    c = write(tmp_path / "c", range(1, 3))
    path = shard_path(c, 2)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(Failure, match=r"c/pairs-00002\.parquet is damaged"):
        merge([a, c], tmp_path / "out")
    path.write_bytes(shard_path(c, 1).read_bytes())
    with pytest.raises(Failure, match="other pairs than its name indicates"):
        merge([a, c], tmp_path / "out")
    assert store.present_shards(tmp_path / "out", SPEC) == [0, 1]


def test_export_and_import_give_the_same_set(tmp_path: Path) -> None:
    made = write(tmp_path / "made", range(3))
    assert export_webdataset(made, tmp_path / "tars") == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tars").glob("*.tar")}
    assert export_webdataset(made, tmp_path / "tars") == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert import_webdataset(tmp_path / "tars", tmp_path / "back") == 3
    assert contents(tmp_path / "back") == contents(made) and verify(tmp_path / "back") == []


def test_webdataset_reads_an_export(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    made = write(tmp_path / "made", range(3))
    export_webdataset(made, tmp_path / "tars")
    urls = [str(tmp_path / "tars" / tar_name(shard)) for shard in range(3)]
    rows = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(rows) == 10
    for row, expected in zip(rows, contents(made), strict=True):
        about = json.loads(row["json"])
        assert {key: expected[key] for key in ("index", "seed", "prompt")} == about
        latents = np.load(io.BytesIO(row["latents.npy"]), allow_pickle=False)
        assert latents.dtype == np.float16 and latents.shape == (4, 2, 3)
        assert latents.tobytes() == expected["latents"]


def test_damaged_and_foreign_exports_are_refused(tmp_path: Path) -> None:
    made = write(tmp_path / "made", range(3))
    export_webdataset(made, tmp_path / "tars")
    with pytest.raises(UserError, match="contains an export of another set"):
        export_webdataset(
            write(tmp_path / "b", range(1), dataclasses.replace(SPEC, seed=4)), tmp_path / "tars"
        )
    with pytest.raises(UserError, match="is not an export of pairs"):
        import_webdataset(tmp_path, tmp_path / "back")
    tar = tmp_path / "tars" / tar_name(1)
    content = tar.read_bytes()
    for wrong in (b"", content[:3000], content.replace(b'"seed"', b'"sead"')):
        tar.write_bytes(wrong)
        with pytest.raises(Failure, match=r"pairs-00001\.tar is damaged"):
            import_webdataset(tmp_path / "tars", tmp_path / "back")
    with tarfile.open(tar, "w"):
        pass
    with pytest.raises(Failure, match=r"pairs-00001\.tar"):
        import_webdataset(tmp_path / "tars", tmp_path / "back")
    tar.write_bytes((tmp_path / "tars" / tar_name(0)).read_bytes())
    with pytest.raises(Failure, match="other pairs than its name indicates"):
        import_webdataset(tmp_path / "tars", tmp_path / "back")
    assert read_shard(tmp_path / "back", 0).index == [0, 1, 2, 3]


def rewrite(tar: Path, changes: dict[str, bytes], mode: str = "w") -> None:
    """Writes a tar file again, with other contents for some of its files."""
    with tarfile.open(tar) as file:
        contents = {member.name: file.extractfile(member).read() for member in file}
    with tarfile.open(tar, mode) as file:
        for name, content in (contents | changes).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def huge_npy() -> bytes:
    """The header of an array of 2 TB, and none of its numbers."""
    buffer = io.BytesIO()
    header = {"descr": "<f2", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def description(index: object, seed: object, prompt: object) -> bytes:
    return json.dumps({"index": index, "seed": seed, "prompt": prompt}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("00000005.json", description(5, 1, "a"), "other pairs than its name indicates"),
        ("00000005.json", description("5", 5, "a"), "other pairs than its name indicates"),
        ("00000005.json", description(5, pair_seed(3, 5), None), "a pair has no prompt"),
        ("00000005.json", description(5, pair_seed(3, 5), 7), "a pair has no prompt"),
        ("00000005.json", b"[" * 100_000, "is damaged"),
        ("00000005.latents.npy", npy(np.full((4, 2, 3), np.nan, np.float16)), "not all finite"),
        ("00000005.latents.npy", npy(np.zeros((4, 2, 3), np.float32)), "is damaged"),
        ("00000005.latents.npy", huge_npy(), "is damaged"),
        ("00000005.latents.npy", npy(np.zeros((4, 2, 3), np.float16))[:-2], "is damaged"),
        ("00000005.noise.npy", npy(np.zeros((4, 2, 3), np.float16)), "not that of its seeds"),
    ],
)
def test_import_refuses_values_that_no_export_writes(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    made = write(tmp_path / "made", range(3), dataclasses.replace(SPEC, keep_noise=True))
    export_webdataset(made, tmp_path / "tars")
    tar = tmp_path / "tars" / tar_name(1)
    rewrite(tar, {})
    assert import_webdataset(tmp_path / "tars", tmp_path / "same") == 3
    rewrite(tar, {name: content})
    with pytest.raises(Failure, match=rf"pairs-00001\.tar .*{message}"):
        import_webdataset(tmp_path / "tars", tmp_path / "back")
    assert not shard_path(tmp_path / "back", 1).exists()


def test_import_reads_nothing_that_is_larger_in_memory_than_on_the_disk(tmp_path: Path) -> None:
    made = write(tmp_path / "made", range(3))
    export_webdataset(made, tmp_path / "tars")
    tar = tmp_path / "tars" / tar_name(1)
    content = tar.read_bytes()
    rewrite(tar, {"bomb": bytes(10**6)}, "w:gz")
    assert tar.stat().st_size < 10**5
    with pytest.raises(Failure, match=r"pairs-00001\.tar is damaged"):
        import_webdataset(tmp_path / "tars", tmp_path / "back")

    # A sparse file of 1 TB, as GNU tar stores it
    tar.write_bytes(content)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    command = ["tar", "--append", "--sparse", "-f", str(tar), "-C", str(tmp_path), "sparse"]
    if subprocess.run(command, check=False).returncode != 0:
        pytest.skip("this tar has no --sparse")
    assert import_webdataset(tmp_path / "tars", tmp_path / "back") == 3
