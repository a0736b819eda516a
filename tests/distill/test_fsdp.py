"""Both players cut over the ranks by torch's fully_shard: the same updates, checkpoints for any number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from distill.test_ranks import (  # noqa: F401 (folder is a fixture)
    BATCH,
    assert_same_entry,
    done,
    environment,
    folder,
    furthest,
    log_of,
    stop_at,
    torchrun,
)
from safetensors import safe_open

from diffusion2gan.distill.checkpoints import BEST, CHECKPOINT
from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.errors import UserError
from diffusion2gan.export import export
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.lock import exclusive_lock

WORKER, PARTS_WORKER = (
    Path(__file__).with_name(name) for name in ("fsdp_worker.py", "parts_worker.py")
)
STATES = ("student/", "ema/", "discriminator/", "adam/", "discriminator_adam/")


def command(folder: Path, out: Path, *settings: str) -> list[object]:  # noqa: F811
    values = json.loads((folder / "recipe.json").read_text())
    given = [f"{key}={value}" for key, value in values.items() if value is not None]
    sets = [word for setting in (*given, *settings) for word in ("--set", setting)]
    return [
        "-m",
        "diffusion2gan",
        "distill",
        "pocket-regression",
        "--pairs",
        folder / "pairs",
        "--out",
        out,
        *sets,
    ]


def alone(folder: Path, out: Path, *settings: str) -> None:  # noqa: F811
    arguments = map(str, command(folder, out, *settings))
    subprocess.run([sys.executable, *arguments], check=True, env=environment(), timeout=900)


def assert_same_run(ours: Path, theirs: Path, within: float) -> None:
    """Every tensor of the checkpoint, and every line of the log."""
    (a, said), (b, expected) = (checkpoint.load(out / CHECKPOINT) for out in (ours, theirs))
    assert (
        said["pairs_seen"] == expected["pairs_seen"]
        and said["num_updates"] == expected["num_updates"]
    )
    for kind in STATES:
        assert furthest(a, b, kind) < within, kind
    assert {key: value.shape for key, value in a.items()} == {
        key: value.shape for key, value in b.items()
    }
    for entry, other in zip(log_of(ours), log_of(theirs), strict=True):
        assert_same_entry(entry, other)


@pytest.mark.slow
def test_two_ranks_with_a_part_each_make_the_same_updates(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """D, R1 (in the first of two steps, on one rank alone), mix-and-match, and sheets of samples between."""
    settings = (f"total_pairs={2 * BATCH}", f"sample_every={BATCH}")
    alone(folder, tmp_path / "alone", *settings)
    for gradient_accumulation_steps in (1, 2):
        out = tmp_path / f"cut{gradient_accumulation_steps}"
        done(
            torchrun(
                2,
                *command(
                    folder,
                    out,
                    *settings,
                    "strategy=fsdp",
                    f"gradient_accumulation_steps={gradient_accumulation_steps}",
                ),
            )
        )
        assert_same_run(out, tmp_path / "alone", 1e-5)
        assert "r1" in log_of(out)[0] and "r1" not in log_of(out)[1]
        assert len(list((out / "samples").iterdir())) == 2


@pytest.mark.slow
def test_memory_is_shared_and_nan_on_one_rank_skips_on_all(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    done(torchrun(2, WORKER, folder, tmp_path))
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["poisoned"] == [False, False] and told["well"] == [
            True,
            True,
        ]  # norms of both players, finite?
        assert told["moved_while_poisoned"] == 0.0 and told["moved"] > 0.0
        assert (
            0.45 < told["share"] < 0.55
        )  # of the numbers of both players, their moments and the average


@pytest.mark.slow
def test_a_run_is_cut_anew_on_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """2 ranks with parts → 1 process → 2 ranks, and an export of the end: one process's run, to 1e-4."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    alone(folder, whole)
    parts = command(folder, moved, "strategy=fsdp", "keep_checkpoints=2", "keep_best=true")
    stop_at(torchrun(2, *parts), moved, 5 * BATCH)
    first = len(log_of(moved))
    assert 5 <= first < 20
    assert_kept(moved, in_parts=(True, True))
    one = [*parts, "--set", "strategy=ddp", "--allow-change", "strategy"]
    stop_at(
        subprocess.Popen(
            [sys.executable, *map(str, one)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ),
        moved,
        10 * BATCH,
        code=0,
    )
    assert first + 2 < len(log_of(moved)) < 20
    assert_kept(moved, in_parts=(False, False))
    done(torchrun(2, *parts))
    assert_kept(moved, in_parts=(True, True))
    assert [entry["pairs_seen"] for entry in log_of(moved)] == [BATCH * (i + 1) for i in range(20)]
    (ours, _), (theirs, _) = (checkpoint.load(out / CHECKPOINT) for out in (moved, whole))
    assert furthest(ours, theirs, "ema/") < 1e-4
    for entry, other in zip(log_of(moved), log_of(whole), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for name in (CHECKPOINT, BEST):
        export(moved / name, tmp_path / name)
        network = DiffusionPipeline.from_pretrained(tmp_path / name).unet.state_dict()
        average = checkpoint.unpack("ema", checkpoint.load(moved / name)[0])
        assert all(torch.equal(value, network[key]) for key, value in average.items())


def assert_kept(out: Path, in_parts: tuple[bool, ...]) -> None:
    """The last two and the best, each whole; of parts those alone that one of them names."""
    numbered = sorted(out.glob("checkpoint-0*.safetensors"))
    assert (
        len(numbered) == len(in_parts)
        and (out / BEST).exists()
        and numbered[-1].samefile(out / CHECKPOINT)
    )
    named = []
    for path in (*numbered, out / BEST):
        tensors, meta = checkpoint.load(path)
        named.append(meta.get("parts", {}).get("folder"))
        assert {key.split("/")[0] + "/" for key in tensors} == set(STATES)
        assert (
            checkpoint.meta(path)["pairs_seen"] % BATCH == 0 and path.stat().st_size < 1e6
        ) or not named[-1]
    assert [name is not None for name in named[:-1]] == list(in_parts)
    assert {path.name for path in out.glob("*parts*")} == {name for name in named if name}
    assert [path.name for path in out.glob(".*")] == []


def test_a_kill_between_two_parts_leaves_the_checkpoint_before(
    folder: Path,
    tmp_path: Path,  # noqa: F811
) -> None:
    process = torchrun(2, PARTS_WORKER, folder, tmp_path)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0 and "SIGKILL" in err.upper()
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [f".{CHECKPOINT}.{2 * BATCH:09d}.tmp"]
    tensors, meta = checkpoint.load(tmp_path / CHECKPOINT)
    assert meta["pairs_seen"] == BATCH and all(
        bool(torch.isfinite(value).all()) for value in tensors.values()
    )
    rows = [
        safe_open(path, "pt") for path in sorted((tmp_path / meta["parts"]["folder"]).iterdir())
    ]
    for (
        key,
        value,
    ) in tensors.items():  # each rank has written its own part of both players, moments and average
        if value.ndim > 0:
            there = [part.get_slice(key).get_shape()[0] for part in rows if key in part.keys()]  # noqa: SIM118
            assert (
                len(there) == 2 and sum(there) == len(value) and there[0] == -(-len(value) // 2)
            ), key
    with exclusive_lock(tmp_path / CHECKPOINT):  # as the next start does
        assert not list(tmp_path.glob(".*.tmp"))


LATE = """
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
        print("TOLD", error, flush=True)
        reported.touch()
        os._exit(0)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_by_the_gathering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.setenv("DIFFUSION2GAN_RANK_TIMEOUT_S", "3")
    out, _ = done(torchrun(2, tmp_path / "late.py"))
    assert "TOLD step 3: rank 1 did not take part" in out


def test_one_process_has_nothing_to_cut() -> None:
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
