"""Training on several ranks: the same updates whatever their number. Real processes, gloo, CPU."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distill.rank_processes import (
    BATCH,
    assert_same_entry,
    assert_same_losses,
    distill_command,
    python,
    relative_difference,
    stopped_command,
    torchrun,
    wait_for_success,
    wait_until_stopped,
)
from distill.run_logs import read_log
from torch import Tensor

from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.distill.run import CHECKPOINT
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import Flags, Group, Ranks

WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.fixture(scope="module")
def results(ranks_folder: Path) -> Path:
    """The folder, with the results of one process."""
    wait_for_success(python(WORKER, ranks_folder))
    return ranks_folder


def load_result(folder: Path, name: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(tensors, the log entries of both steps)."""
    tensors, meta = checkpoint.load(folder / name)
    return tensors, json.loads(meta["entries"])


def assert_same_updates(folder: Path, name: str) -> None:
    """The two updates are those of one process and one micro-batch."""
    tensors, entries = load_result(folder, name)
    expected_tensors, expected_entries = load_result(folder, "w1a1-0")
    for prefix in ("student/", "d/", "ema/", "g"):
        assert relative_difference(tensors, expected_tensors, prefix) < 1e-5, prefix
    for entry, expected in zip(entries, expected_entries, strict=True):
        assert_same_entry(entry, expected)

    # They include the R1 penalty and mismatched fakes
    assert "r1" in expected_entries[0]
    assert "r1" not in expected_entries[1]
    assert expected_entries[0]["accuracy_mixed"] is not None


def test_micro_batches_are_the_same_update(results: Path) -> None:
    assert_same_updates(results, "w1a2-0")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_is_the_same_update(results: Path, world_size: int) -> None:
    wait_for_success(torchrun(world_size, WORKER, results))
    last = world_size - 1

    for accumulation in (1, 2):
        name = f"w{world_size}a{accumulation}"
        assert_same_updates(results, f"{name}-0")

        # All ranks have the same bits
        tensors, entries = load_result(results, f"{name}-0")
        last_tensors, last_entries = load_result(results, f"{name}-{last}")
        assert entries == last_entries
        for key, value in tensors.items():
            assert torch.equal(last_tensors[key], value), key

        # One exchange per update: the discriminator's, the student's
        for rank in range(world_size):
            meta = checkpoint.meta(results / f"{name}-{rank}")
            assert meta["collectives"] == ["all_reduce", "all_reduce"]

    # NaN on one rank: all ranks skip the first step, and go on together
    with_nan, entries = load_result(results, f"w{world_size}nan-0")
    without_nan, _ = load_result(results, "w1a1-0")
    last_with_nan, _ = load_result(results, f"w{world_size}nan-{last}")
    assert not math.isfinite(entries[0]["grad_norm"])
    assert not math.isfinite(entries[0]["d_grad_norm"])
    assert math.isfinite(entries[1]["grad_norm"])
    assert relative_difference(with_nan, without_nan, "student/") > 1e-6
    for key, value in with_nan.items():
        if not key.startswith("g"):
            assert bool(torch.isfinite(value).all()), key
            assert torch.equal(last_with_nan[key], value), key


@pytest.mark.slow
def test_run_resumes_on_another_number_of_ranks(ranks_folder: Path, tmp_path: Path) -> None:
    """2 → 4 → 1 ranks, each stopped by SIGTERM: nearly the losses of one process."""
    expected = tmp_path / "expected"
    moved = tmp_path / "moved"
    wait_for_success(python(*distill_command(ranks_folder, expected)))

    command = distill_command(ranks_folder, moved)
    wait_until_stopped(torchrun(2, *stopped_command(command, 5 * BATCH)))
    assert len(read_log(moved)) == 6
    wait_until_stopped(torchrun(4, *stopped_command(command, 12 * BATCH)))
    assert len(read_log(moved)) == 13
    wait_for_success(python(*distill_command(ranks_folder, moved)))

    progress = [entry["pairs_seen"] for entry in read_log(moved)]
    assert progress == [BATCH * (i + 1) for i in range(20)]
    assert_same_losses(moved, expected)
    tensors, _ = checkpoint.load(moved / CHECKPOINT)
    expected_tensors, _ = checkpoint.load(expected / CHECKPOINT)
    assert relative_difference(tensors, expected_tensors, "ema/") < 1e-4


@pytest.mark.slow
def test_preempted_run_exits_with_0_and_a_second_process_is_refused(
    ranks_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = distill_command(ranks_folder, out, "total_pairs=80000")
    first = python(*command)
    while len(read_log(out)) < 2:
        assert first.poll() is None
        time.sleep(0.05)

    # A second process in the same folder
    second = python(*command)
    _, err = second.communicate(timeout=300)
    assert second.returncode == 2
    assert f"being written by another process (process {first.pid}" in err

    # SIGTERM: the first one saves
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=300)
    assert first.returncode == 0
    assert "stopped and saved" in err, err
    pairs_seen = checkpoint.load(out / CHECKPOINT)[1]["pairs_seen"]
    assert pairs_seen == read_log(out)[-1]["pairs_seen"]
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_run_survives_the_loss_of_a_rank(ranks_folder: Path, tmp_path: Path) -> None:
    """kill −9 of one of two ranks: torchrun --max-restarts starts both from the checkpoint."""
    expected = tmp_path / "expected"
    out = tmp_path / "run"
    wait_for_success(python(*distill_command(ranks_folder, expected)))

    command = stopped_command(distill_command(ranks_folder, out), 4 * BATCH, "KILL")
    _, err = wait_for_success(torchrun(2, "--max-restarts", 2, *command))
    assert "KILLED" in err

    assert_same_losses(out, expected)


def test_batch_that_cannot_be_divided_over_the_ranks_is_refused() -> None:
    recipe = Recipe(batch_size=24, gradient_accumulation_steps=2)
    for world_size in (1, 2, 3, 4, 6, 12):
        check_ranks(recipe, world_size)
    with pytest.raises(
        UserError, match=r"cannot be divided over 5 ranks.*numbers of ranks: 1, 2, 3, 4, 6, 12;"
    ):
        check_ranks(recipe, 5)


HANG = """
import os, time, torch
from pathlib import Path
from diffusion2gan.errors import Failure
from diffusion2gan.runtime.distributed import connect_ranks
reported = Path(__file__).with_name("reported")
layer = torch.nn.Linear(2, 2)
layer(torch.ones(1, 2)).sum().backward()
with connect_ranks(torch.device("cpu")) as group:
    group.sum(layer, [])
    if group.ranks.rank == 1:
        while not reported.exists():  # hangs until rank 0 has reported it
            time.sleep(0.05)
        os._exit(0)
    try:
        group.sum(layer, [])
    except Failure as error:
        print("REPORTED", error, flush=True)
        reported.touch()
        os._exit(0)
"""


@pytest.mark.slow
def test_hanging_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    monkeypatch.setenv("DIFFUSION2GAN_RANK_TIMEOUT_S", "3")
    out, _ = wait_for_success(torchrun(2, tmp_path / "hang.py"))
    assert "REPORTED step 2: rank 1 did not take part" in out
    assert "run the same command to continue" in out


FOLDER_PER_RANK = """
import os
from pathlib import Path
from diffusion2gan import cli
os.chdir(Path(__file__).with_name("rank" + os.environ["RANK"]))
cli.main()
"""


@pytest.mark.slow
def test_ranks_with_different_folders_are_refused(ranks_folder: Path, tmp_path: Path) -> None:
    """Rank 1 finds no run where rank 0 finds one: nothing is trained."""
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank1").mkdir()
    existing_run = tmp_path / "rank0" / "run"
    wait_for_success(python(*distill_command(ranks_folder, existing_run, "total_pairs=8")))

    script = tmp_path / "folder_per_rank.py"
    script.write_text(FOLDER_PER_RANK)
    arguments = distill_command(ranks_folder, Path("run"), "total_pairs=8")[2:]
    process = torchrun(2, script, *arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "rank 0 finds a run with 8 pairs, rank 1 one with 0" in err, err
    assert "All ranks must use the same folder" in err
    assert not (tmp_path / "rank1" / "run" / "log.jsonl").exists()


def test_group_of_one_rank_returns_its_arguments() -> None:
    group = Group(Ranks())
    layer = torch.nn.Linear(1, 1)
    extra = torch.ones(3)
    (summed,), flags = group.sum(layer, [extra], Flags(stop=True))
    assert summed is extra
    assert layer.weight.grad is None
    assert flags == Flags(stop=True)
