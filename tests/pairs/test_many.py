"""Ranks, shard ranges and restarts together make the set that one process makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.pairs import make, store
from diffusion2gan.pairs.check import verify
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import Pairs, PairsSpec, present_shards, read_shard, shard_path
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

COUNT, SHARD = 22, 4  # six shards, the last of two


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return load_teacher(str(tiny_teacher))


@pytest.fixture(scope="module")
def spec(teacher: Teacher) -> PairsSpec:
    return PairsSpec(
        teacher.name, teacher.revision, "words", COUNT, 2, 2, 3.0, teacher.latent_shape, SHARD, True
    )


def prompts_of(indices: Sequence[int]) -> list[str]:
    return [f"a star {i % 3}" for i in indices]


def columns(folder: Path, spec: PairsSpec) -> tuple[Pairs, bytes]:
    """Everything in the set, the stored noise as bytes."""
    pairs = Pairs.concat([read_shard(folder, shard) for shard in range(spec.num_shards)])
    tables = [store.read_table(folder, shard, spec) for shard in range(spec.num_shards)]
    return pairs, b"".join(row for table in tables for row in table["noise"].to_pylist())


@pytest.fixture(scope="module")
def alone(
    teacher: Teacher, spec: PairsSpec, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pairs, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    make_pairs(teacher, prompts_of, spec, folder)
    return columns(folder, spec)


def assert_same_set(folder: Path, spec: PairsSpec, alone: tuple[Pairs, bytes]) -> None:
    (found, noise), (expected, expected_noise) = columns(folder, spec), alone
    assert noise == expected_noise  # bit for bit
    assert (found.index, found.seed, found.prompts) == (
        expected.index,
        expected.seed,
        expected.prompts,
    )
    torch.testing.assert_close(
        found.latents, expected.latents, rtol=1e-3, atol=1e-3
    )  # other batches, float16
    assert verify(folder) == [] and not [
        path for path in folder.iterdir() if path.name.startswith(".")
    ]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_ranks_make_every_nth_shard(
    teacher: Teacher,
    spec: PairsSpec,
    alone: tuple[Pairs, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for rank, batch_size in ((2, 1), (1, 3), (0, 64)):
        as_rank(monkeypatch, rank, 3)
        before = set(present_shards(tmp_path, spec))
        make_pairs(teacher, prompts_of, spec, tmp_path, batch_size)
        assert set(present_shards(tmp_path, spec)) - before == {rank, rank + 3}
    assert_same_set(tmp_path, spec, alone)


def test_ranges_ranks_and_interruptions_give_the_same_set(
    teacher: Teacher,
    spec: PairsSpec,
    alone: tuple[Pairs, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_pairs(teacher, prompts_of, spec, tmp_path, 5, range(4, 6))
    assert present_shards(tmp_path, spec) == [4, 5]
    as_rank(monkeypatch, 1, 2)
    make_pairs(
        teacher, prompts_of, spec, tmp_path, 2, range(1, 5)
    )  # shards 2 and 4, which is there
    assert present_shards(tmp_path, spec) == [2, 4, 5]
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    requested: list[int] = []

    def interrupted(indices: Sequence[int]) -> list[str]:
        requested.extend(indices)
        if 5 in indices:
            raise KeyboardInterrupt
        return prompts_of(indices)

    with pytest.raises(KeyboardInterrupt):
        make_pairs(teacher, interrupted, spec, tmp_path, 2)
    assert present_shards(tmp_path, spec) == [0, 2, 4, 5] and requested == [0, 1, 2, 3, 4, 5]
    make_pairs(teacher, prompts_of, spec, tmp_path, 64)
    assert_same_set(tmp_path, spec, alone)


def test_ranks_that_never_come_are_reported(
    teacher: Teacher,
    spec: PairsSpec,
    alone: tuple[Pairs, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 keeps its shards and ends with a message; without ranks the same command goes on."""
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(make, "BARRIER_TIMEOUT_S", 0.0)
    monkeypatch.setattr(make, "POLL_S", 0.01)
    with pytest.raises(Failure, match=r"3 of 6 shards are missing .*, the first is number 1\..*"):
        make_pairs(teacher, prompts_of, spec, tmp_path)
    assert present_shards(tmp_path, spec) == [0, 2, 4]

    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    make_pairs(teacher, prompts_of, spec, tmp_path)
    assert_same_set(tmp_path, spec, alone)


def test_rank_0_waits_as_long_as_shards_are_finished(
    teacher: Teacher, spec: PairsSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which every look at the folder takes 0.6 of the limit."""
    as_rank(monkeypatch, 1, 2)
    make_pairs(teacher, prompts_of, spec, tmp_path)
    as_rank(monkeypatch, 0, 2)
    hidden = {number: shard_path(tmp_path, number).read_bytes() for number in (1, 3, 5)}
    for number in hidden:
        shard_path(tmp_path, number).unlink()

    clock = 0.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += 0.6 * make.BARRIER_TIMEOUT_S
        number = min(hidden)
        shard_path(tmp_path, number).write_bytes(hidden.pop(number))

    monkeypatch.setattr(make.time, "sleep", sleep)
    monkeypatch.setattr(make.time, "monotonic", lambda: clock)
    make_pairs(teacher, prompts_of, spec, tmp_path)
    assert not hidden and clock > make.BARRIER_TIMEOUT_S


def test_a_locked_shard_is_refused_and_others_are_made(
    teacher: Teacher, spec: PairsSpec, tmp_path: Path
) -> None:
    with exclusive_lock(shard_path(tmp_path, 1)):
        with pytest.raises(
            UserError, match=r"pairs-00001\.parquet is being written by another process"
        ):
            make_pairs(teacher, prompts_of, spec, tmp_path)
        make_pairs(
            teacher, prompts_of, spec, tmp_path, shards=range(2, 3)
        )  # other shards of the set go on
    assert present_shards(tmp_path, spec) == [0, 2]


def test_a_shard_finished_before_the_lock_is_kept(
    teacher: Teacher, spec: PairsSpec, tmp_path: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """Another process finishes shard 0 after this one has listed the folder, before it locks it."""
    make_pairs(teacher, prompts_of, spec, tmp_path, shards=range(0, 1))
    before = shard_path(tmp_path, 0).stat().st_mtime_ns
    looks = iter([[], [0]])
    monkeypatch.setattr(make, "present_shards", lambda *_: next(looks, [0]))
    monkeypatch.setattr(make, "count_finished", lambda *_: 0)
    make_pairs(teacher, prompts_of, spec, tmp_path, shards=range(0, 1))
    assert shard_path(tmp_path, 0).stat().st_mtime_ns == before


@pytest.mark.parametrize("wrong", [range(0, 7), range(3, 3), range(5, 2), range(6, 7)])
def test_ranges_outside_the_set_are_refused(
    teacher: Teacher, spec: PairsSpec, tmp_path: Path, wrong: range
) -> None:
    with pytest.raises(
        UserError, match=rf"--shard-range {wrong.start}:{wrong.stop} is not inside .* 0:6 is all"
    ):
        make_pairs(teacher, prompts_of, spec, tmp_path, shards=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_under_torchrun_make_the_same_set(tiny_teacher: Path, tmp_path: Path) -> None:
    """Two real ranks, one result; progress of both from the first alone."""
    command = [
        "-m",
        "diffusion2gan",
        "pairs",
        "--teacher",
        tiny_teacher,
        "--prompts",
        "pocket",
        "--count",
        14,
        "--shard-size",
        4,
        "--num-inference-steps",
        2,
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    ran = subprocess.run(
        [*torchrun, *map(str, command), "--out", tmp_path / "two"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("14 pairs") == 1 and ran.stderr.count("pairs: 14/14") == 1
    one = subprocess.run(
        [sys.executable, *map(str, command), "--out", tmp_path / "one"], timeout=300
    )
    assert one.returncode == 0
    spec = store.open_set(tmp_path / "one")
    assert store.open_set(tmp_path / "two") == spec and verify(tmp_path / "two") == []
    for shard in range(spec.num_shards):
        a, b = (read_shard(tmp_path / name, shard) for name in ("one", "two"))
        assert a.seed == b.seed and a.prompts == b.prompts
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-3, atol=1e-3)
