"""strategy=fsdp: the same updates, and checkpoints that any number of ranks can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
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
from safetensors import safe_open

from diffusion2gan.distill.checkpoints import BEST, CHECKPOINT
from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.errors import UserError
from diffusion2gan.export import export
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.lock import exclusive_lock

WORKER = Path(__file__).with_name("fsdp_worker.py")
CHECKPOINT_WORKER = Path(__file__).with_name("sharded_checkpoint_worker.py")
STATES = ("student/", "ema/", "discriminator/", "adam/", "discriminator_adam/")


def assert_same_run(found: Path, expected: Path, tolerance: float) -> None:
    """All tensors of the checkpoint, and all lines of the log, are nearly equal."""
    tensors, meta = checkpoint.load(found / CHECKPOINT)
    expected_tensors, expected_meta = checkpoint.load(expected / CHECKPOINT)
    assert meta["pairs_seen"] == expected_meta["pairs_seen"]
    assert meta["num_updates"] == expected_meta["num_updates"]
    for prefix in STATES:
        assert relative_difference(tensors, expected_tensors, prefix) < tolerance, prefix
    for key, value in expected_tensors.items():
        assert tensors[key].shape == value.shape, key
    for entry, expected_entry in zip(read_log(found), read_log(expected), strict=True):
        assert_same_entry(entry, expected_entry)


@pytest.mark.slow
def test_two_sharded_ranks_make_the_same_updates(ranks_folder: Path, tmp_path: Path) -> None:
    """With discriminator, R1 (in the first step, on one rank), mismatched fakes, samples."""
    settings = (f"total_pairs={2 * BATCH}", f"sample_every={BATCH}")
    expected = tmp_path / "expected"
    wait_for_success(python(*distill_command(ranks_folder, expected, *settings)))

    for accumulation in (1, 2):
        out = tmp_path / f"sharded{accumulation}"
        command = distill_command(
            ranks_folder,
            out,
            *settings,
            "strategy=fsdp",
            f"gradient_accumulation_steps={accumulation}",
        )
        wait_for_success(torchrun(2, *command))
        assert_same_run(out, expected, 1e-5)
        assert "r1" in read_log(out)[0]
        assert "r1" not in read_log(out)[1]
        assert len(list((out / "samples").iterdir())) == 2


@pytest.mark.slow
def test_memory_is_shared_and_nan_on_one_rank_skips_on_all(
    ranks_folder: Path, tmp_path: Path
) -> None:
    wait_for_success(torchrun(2, WORKER, ranks_folder, tmp_path))
    for rank in (0, 1):
        result = json.loads((tmp_path / f"{rank}.json").read_text())

        # The gradient norms of student and discriminator
        assert result["finite_with_nan"] == [False, False]
        assert result["finite"] == [True, True]
        assert result["change_with_nan"] == 0.0
        assert result["change"] > 0.0

        # A weight that is NaN on rank 1: both ranks end, and nothing is written
        assert "1 of the " in result["message"] and "no checkpoint was written" in result["message"]
        assert not (tmp_path / "run").exists()

        # Weights, Adam's averages and the EMA
        assert 0.45 < result["local_share"] < 0.55


@pytest.mark.slow
def test_sharded_run_resumes_on_another_number_of_ranks(ranks_folder: Path, tmp_path: Path) -> None:
    """2 sharded ranks → 1 process → 2 sharded ranks, then export: nearly one process's run."""
    expected = tmp_path / "expected"
    moved = tmp_path / "moved"
    wait_for_success(python(*distill_command(ranks_folder, expected)))

    # Two ranks
    sharded = distill_command(
        ranks_folder, moved, "strategy=fsdp", "keep_checkpoints=2", "keep_best=true"
    )
    wait_until_stopped(torchrun(2, *stopped_command(sharded, 5 * BATCH)))
    assert len(read_log(moved)) == 6
    assert_kept_checkpoints(moved, is_sharded=[True, True])

    # One process
    single = [*sharded, "--set", "strategy=ddp", "--allow-change", "strategy"]
    wait_until_stopped(python(*stopped_command(single, 10 * BATCH)), code=0)
    assert len(read_log(moved)) == 11
    assert_kept_checkpoints(moved, is_sharded=[False, False])

    # Two ranks again
    wait_for_success(torchrun(2, *sharded))
    assert_kept_checkpoints(moved, is_sharded=[True, True])

    progress = [entry["pairs_seen"] for entry in read_log(moved)]
    assert progress == [BATCH * (i + 1) for i in range(20)]
    assert_same_losses(moved, expected)
    tensors, _ = checkpoint.load(moved / CHECKPOINT)
    expected_tensors, _ = checkpoint.load(expected / CHECKPOINT)
    assert relative_difference(tensors, expected_tensors, "ema/") < 1e-4

    # Export of the newest and of the best
    for name in (CHECKPOINT, BEST):
        export(moved / name, tmp_path / name)
        network = DiffusionPipeline.from_pretrained(tmp_path / name).unet.state_dict()
        average = checkpoint.unpack("ema", checkpoint.load(moved / name)[0])
        for key, value in average.items():
            assert torch.equal(network[key], value), key


def assert_kept_checkpoints(out: Path, is_sharded: list[bool]) -> None:
    """The last ones and the best are complete, and no shards are left that none of them names."""
    numbered = sorted(out.glob("checkpoint-0*.safetensors"))
    assert len(numbered) == len(is_sharded)
    assert numbered[-1].samefile(out / CHECKPOINT)

    shard_folders = []
    for path in (*numbered, out / BEST):
        tensors, meta = checkpoint.load(path)
        assert {key.split("/")[0] + "/" for key in tensors} == set(STATES)
        shard_folder = meta.get("parts", {}).get("folder")
        shard_folders.append(shard_folder)
        if shard_folder is not None:
            assert meta["pairs_seen"] % BATCH == 0
            assert path.stat().st_size < 1e6  # the tensors are in the shards

    assert [folder is not None for folder in shard_folders[:-1]] == is_sharded
    existing = {path.name for path in out.glob("*parts*")}
    assert existing == {folder for folder in shard_folders if folder}
    assert not list(out.glob(".*"))


def test_kill_between_two_shards_leaves_the_previous_checkpoint(
    ranks_folder: Path, tmp_path: Path
) -> None:
    process = torchrun(2, CHECKPOINT_WORKER, ranks_folder, tmp_path)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "SIGKILL" in err.upper()

    # The unfinished shards are in a temporary folder
    temporary = [path.name for path in tmp_path.glob(".*.tmp")]
    assert temporary == [f".{CHECKPOINT}.{2 * BATCH:09d}.tmp"]

    # The previous checkpoint is complete
    tensors, meta = checkpoint.load(tmp_path / CHECKPOINT)
    assert meta["pairs_seen"] == BATCH
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())

    # Each rank wrote half the rows of every tensor
    shard_folder = tmp_path / meta["parts"]["folder"]
    shard_files = [safe_open(path, "pt") for path in sorted(shard_folder.iterdir())]
    for key, value in tensors.items():
        if value.ndim == 0:
            continue
        rows = []
        for file in shard_files:
            if key in set(file.keys()):
                rows.append(file.get_slice(key).get_shape()[0])
        first_half = -(-len(value) // 2)
        assert rows == [first_half, len(value) - first_half], key

    # The next start removes the temporary folder
    with exclusive_lock(tmp_path / CHECKPOINT):
        assert not list(tmp_path.glob(".*.tmp"))


HANG = """
import os, time, torch
from pathlib import Path
from diffusion2gan.errors import Failure
from diffusion2gan.runtime import fsdp
from diffusion2gan.runtime.distributed import connect_ranks
reported = Path(__file__).with_name("reported")
layer = torch.nn.Linear(4, 4)
with connect_ranks(torch.device("cpu")) as group:
    fsdp.shard(layer, torch.device("cpu"))
    group.unshard(layer, None)
    layer(torch.ones(1, 4)).sum().backward()
    group.sum(layer, [])
    if group.ranks.rank == 1:
        while not reported.exists():  # hangs until rank 0 has reported it
            time.sleep(0.05)
        os._exit(0)
    try:
        group.unshard(layer)
    except Failure as error:
        print("REPORTED", error, flush=True)
        reported.touch()
        os._exit(0)
"""


@pytest.mark.slow
def test_hanging_rank_is_named_by_unshard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    monkeypatch.setenv("DIFFUSION2GAN_RANK_TIMEOUT_S", "3")
    out, _ = wait_for_success(torchrun(2, tmp_path / "hang.py"))
    assert "REPORTED step 3: rank 1 did not take part" in out


def test_fsdp_needs_several_ranks_and_adamw() -> None:
    recipe = Recipe(batch_size=8, strategy="fsdp")
    check_ranks(recipe, 2)
    with pytest.raises(
        UserError, match=r"this is one process.*torchrun.*strategy=ddp.*--allow-change strategy"
    ):
        check_ranks(recipe, 1)
    with pytest.raises(
        UserError, match=r"strategy=fsdp with optimizer=adamw8bit.*optimizer=adamw, or strategy=ddp"
    ):
        check_ranks(Recipe(strategy="fsdp", optimizer="adamw8bit"), 2)
