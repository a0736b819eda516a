"""The order of reading: a permutation per epoch, and the same stream from any position."""

from __future__ import annotations

import dataclasses
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs import sampler, store
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec

COUNT = 23


@pytest.fixture(params=[1, 2, 128], ids=lambda window: f"window{window}")
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """23 pairs in shards of 7, row groups of 3: nothing divides anything."""
    monkeypatch.setattr(sampler, "WINDOW", request.param)
    monkeypatch.setattr(sampler, "ROW_GROUP", 3)
    monkeypatch.setattr(store, "ROW_GROUP", 3)
    spec = PairsSpec("t", "r", "p", COUNT, 1, 5, 3.0, (1, 2, 2), 7)
    store.start_set(tmp_path, spec)
    for shard in range(spec.num_shards):
        indices = spec.shard_indices(shard)
        seeds = [pair_seed(1, i) for i in indices]
        pairs = Pairs(
            list(indices),
            seeds,
            [f"prompt {i}" for i in indices],
            noise_from_seeds(seeds, (1, 2, 2)),
        )
        store.write_shard(tmp_path, shard, spec, pairs)
    return tmp_path


def stream(
    folder: Path, count: int, batch_size: int = 1, position: int = 0, seed: int = 0
) -> list[int]:
    batches = PairReader(folder, seed).batches(batch_size, position)
    return [index for batch in islice(batches, count // batch_size) for index in batch.index]


def test_each_epoch_is_a_permutation(folder: Path) -> None:
    order = stream(folder, 3 * COUNT)
    epochs = [order[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and list(range(COUNT)) not in epochs


@pytest.mark.parametrize("batch_size", [1, 2, 5, 23, 30])
def test_any_position_continues_the_same_stream(folder: Path, batch_size: int) -> None:
    length = 3 * COUNT // batch_size * batch_size
    complete = stream(folder, length, batch_size)
    assert complete == stream(folder, length)  # the order does not depend on the batch
    for position in range(0, length, batch_size):
        assert stream(folder, length - position, batch_size, position) == complete[position:]


def test_the_order_depends_on_the_seed(folder: Path) -> None:
    assert (
        stream(folder, COUNT, seed=0)
        == stream(folder, COUNT, seed=0)
        != stream(folder, COUNT, seed=1)
    )


def test_seed_prompt_and_latents_of_a_pair_stay_together(folder: Path) -> None:
    for batch in islice(PairReader(folder, 0).batches(4), 12):
        assert batch.seed == [pair_seed(1, i) for i in batch.index]
        assert batch.prompts == [f"prompt {i}" for i in batch.index]
        assert batch.latents.equal(noise_from_seeds(batch.seed, (1, 2, 2)).half().float())


def test_first_returns_the_first_pairs_of_the_set(folder: Path) -> None:
    reader = PairReader(folder, 0)
    assert reader.first(9).index == list(range(9)) and reader.first(99).index == list(range(COUNT))


@pytest.mark.parametrize(
    ("shard_size", "expected"), [(128, 128), (1000, 16), (16_384, 1), (10**6, 1)]
)
def test_windows_are_bounded_in_pairs_and_bytes(shard_size: int, expected: int) -> None:
    """16 384 pairs of SD 1.5, half a GiB; of larger latents fewer pairs, the same memory."""
    sd = PairsSpec("t", "r", "p", 10**7, 1, 5, 3.0, (4, 64, 64), shard_size)
    assert sampler.shards_per_window(sd) == expected
    assert sampler.shards_per_window(dataclasses.replace(sd, latent_shape=(4, 128, 128))) == max(
        1, expected // 4
    )


def test_the_next_window_is_read_in_the_background(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = sampler.read_shard

    def noted(folder: Path, shard: int, **options: object) -> Pairs:
        read.append(shard)
        return real(folder, shard, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sampler, "read_shard", noted)
    batches = PairReader(folder, 0).batches(1)
    spec = PairReader(folder, 0).spec
    two_windows = 2 * min(sampler.shards_per_window(spec), spec.num_shards)
    next(batches)
    deadline = time.monotonic() + 60
    while len(read) < two_windows and time.monotonic() < deadline:  # in another thread, unasked
        time.sleep(0.01)
    batches.close()  # type: ignore[attr-defined]
    assert len(read) == two_windows and len(threading.enumerate()) < 10


def test_an_incomplete_set_is_refused(folder: Path) -> None:
    store.shard_path(folder, 2).unlink()
    with pytest.raises(
        UserError, match=r"1 of 4 shards are missing \(first: pairs-00002\.parquet\)"
    ):
        PairReader(folder, 0)


def test_a_set_of_one_pair_fills_any_batch(tmp_path: Path) -> None:
    spec = dataclasses.replace(PairsSpec("t", "r", "p", 1, 1, 5, 3.0, (1, 2, 2), 7))
    store.start_set(tmp_path, spec)
    store.write_shard(
        tmp_path, 0, spec, Pairs([0], [pair_seed(1, 0)], ["a"], noise_from_seeds([0], (1, 2, 2)))
    )
    assert stream(tmp_path, 6, batch_size=3) == [0] * 6
