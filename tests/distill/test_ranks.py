"""Training by ranks: one global batch, one update, whoever works it. Real processes under torchrun, gloo on the CPU."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
import torch
from torch import Tensor

from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.distill.run import CHECKPOINT
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import Flags, Group, Ranks
from diffusion2gan.teacher.loading import load_teacher

WORKER = Path(__file__).with_name("ranks_worker.py")
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, its pairs, a tiny distance, and the recipe of the whole method."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_pocket.save(folder / "teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LatentLPIPS(VGG(4, (8, 8, 8, 8, 8), 2), [torch.rand(8) for _ in range(5)]).save_pretrained(
            folder / "vgg"
        )
    teacher = load_teacher(str(folder / "teacher"))
    spec = PairsSpec(
        teacher.name, teacher.revision, "words", 24, 0, 2, 1.0, teacher.latent_shape, 8
    )
    make_pairs(
        teacher, lambda indices: [f"a star {i % 5}" for i in indices], spec, folder / "pairs"
    )
    recipe = Recipe(
        teacher=str(folder / "teacher"),
        perceptual=str(folder / "vgg"),
        total_pairs=20 * BATCH,
        batch_size=BATCH,
        adversarial_weight=0.5,
        discriminator_warmup=0,
        r1_every=2,
        r1_weight=1e-3,
        mix_share=0.4,
        warmup=0.0,
        learning_rate=1e-4,
        checkpoint_every_s=1e-9,
        sample_every=10**6,
    )
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump()))
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(world: int, *command: object, **options: Any) -> subprocess.Popen[str]:
    prefix = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
    ]
    return subprocess.Popen(
        [*prefix, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    )


def done(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, str(WORKER), str(folder)], check=True, env=environment(), timeout=900
    )
    return folder


def result(folder: Path, name: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors, meta = checkpoint.load(folder / name)
    return tensors, json.loads(meta["entries"])


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor], kind: str) -> float:
    """‖a − b‖ / ‖b‖ over all tensors of a kind."""
    keys = [key for key in theirs if key.startswith(kind)]
    assert keys and ours.keys() == theirs.keys()
    a, b = (
        torch.cat([tensors[key].double().flatten() for key in keys]) for tensors in (ours, theirs)
    )
    return float((a - b).norm() / b.norm())


def assert_same_entry(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key


def assert_same_updates(folder: Path, name: str) -> None:
    (ours, entries), (theirs, expected) = result(folder, name), result(folder, "w1a1-0")
    for kind in ("student/", "d/", "ema/", "g"):
        assert furthest(ours, theirs, kind) < 1e-5, kind
    for entry, other in zip(entries, expected, strict=True):
        assert_same_entry(entry, other)
    assert (
        "r1" in expected[0]
        and "r1" not in expected[1]
        and expected[0]["accuracy_mixed"] is not None
    )


def test_parts_are_the_same_update(alone: Path) -> None:
    assert_same_updates(alone, "w1a2-0")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_is_the_same_update(alone: Path, world: int) -> None:
    done(torchrun(world, WORKER, alone))
    for gradient_accumulation_steps in (1, 2):
        assert_same_updates(alone, f"w{world}a{gradient_accumulation_steps}-0")
        first, last = (
            result(alone, f"w{world}a{gradient_accumulation_steps}-{rank}")
            for rank in (0, world - 1)
        )
        for rank in range(world):  # one exchange an update: D's, the student's
            meta = checkpoint.meta(alone / f"w{world}a{gradient_accumulation_steps}-{rank}")
            assert meta["exchanges"] == ["all_reduce", "all_reduce"]
        assert first[1] == last[1] and all(
            torch.equal(first[0][key], last[0][key]) for key in first[0]
        )
    (poisoned, entries), (well, _) = result(alone, f"w{world}nan-0"), result(alone, "w1a1-0")
    assert not math.isfinite(entries[0]["grad_norm"]) and not math.isfinite(
        entries[0]["d_grad_norm"]
    )
    assert math.isfinite(
        entries[1]["grad_norm"]
    )  # all ranks skipped the first step, and go on together
    assert all(
        bool(torch.isfinite(value).all())
        for key, value in poisoned.items()
        if not key.startswith("g")
    )
    assert furthest(poisoned, well, "student/") > 1e-6
    last = result(alone, f"w{world}nan-{world - 1}")[0]
    assert all(torch.equal(poisoned[key], last[key]) for key in poisoned if not key.startswith("g"))


def distill_args(folder: Path, out: Path, *settings: str) -> list[object]:
    values = json.loads((folder / "recipe.json").read_text())
    sets = [
        word
        for key, value in values.items()
        if value is not None
        for word in ("--set", f"{key}={value}")
    ]
    more = [word for setting in settings for word in ("--set", setting)]
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
        *more,
    ]


def log_of(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stop_at(process: subprocess.Popen[str], out: Path, pairs_seen: int, code: int = 1) -> None:
    """SIGTERM once the run has seen so many pairs. Torchrun's own code is then 1, though every rank ends with 0."""
    end = time.monotonic() + 600
    while (
        not (log := log_of(out)) or log[-1]["pairs_seen"] < pairs_seen
    ) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code and "stopped and saved" in err, (process.returncode, err)


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    """2 → 4 → 1, each stopped by SIGTERM: the same losses as one process alone, to 1e-4 after twenty steps."""
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    subprocess.run(
        [sys.executable, *map(str, distill_args(folder, alone))], check=True, env=environment()
    )
    stop_at(torchrun(2, *distill_args(folder, moved)), moved, 5 * BATCH)
    assert 5 <= len(log_of(moved)) < 20
    stop_at(torchrun(4, *distill_args(folder, moved)), moved, 12 * BATCH)
    last = subprocess.run(
        [sys.executable, *map(str, distill_args(folder, moved))], env=environment()
    )
    assert last.returncode == 0
    ours, theirs = log_of(moved), log_of(alone)
    assert [entry["pairs_seen"] for entry in ours] == [BATCH * (i + 1) for i in range(20)]
    for entry, other in zip(ours, theirs, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert (
        furthest(
            checkpoint.load(moved / CHECKPOINT)[0], checkpoint.load(alone / CHECKPOINT)[0], "ema/"
        )
        < 1e-4
    )


@pytest.mark.slow
def test_preemption_ends_well_and_a_second_run_is_refused(folder: Path, tmp_path: Path) -> None:
    """SIGTERM: a checkpoint, exit code 0. Two processes in one folder: the second is refused, the first goes on."""
    out = tmp_path / "run"
    command = [sys.executable, *map(str, distill_args(folder, out, "total_pairs=80000"))]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    while len(log_of(out)) < 2:
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert (
        second.returncode == 2
        and f"being written by another process (process {first.pid}" in second.stderr
    )
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=300)
    assert first.returncode == 0 and "stopped and saved" in err
    assert checkpoint.load(out / CHECKPOINT)[1]["pairs_seen"] == log_of(out)[-1]["pairs_seen"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_the_loss_of_a_rank_is_survived(folder: Path, tmp_path: Path) -> None:
    """kill −9 of one of two ranks: torchrun --max-restarts starts both anew, from the checkpoint, to the same end."""
    alone, out = tmp_path / "alone", tmp_path / "run"
    subprocess.run(
        [sys.executable, *map(str, distill_args(folder, alone))], check=True, env=environment()
    )
    process = torchrun(2, "--max-restarts", 2, *distill_args(folder, out))
    while len(log_of(out)) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    victims = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    os.kill(int(victims.stdout.split()[-1]), signal.SIGKILL)
    done(process)
    ours, theirs = log_of(out), log_of(alone)
    assert [entry["pairs_seen"] for entry in ours] == [entry["pairs_seen"] for entry in theirs]
    for entry, other in zip(ours, theirs, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    recipe = Recipe(batch_size=24, gradient_accumulation_steps=2)
    for world in (1, 2, 3, 4, 6, 12):
        check_ranks(recipe, world)
    with pytest.raises(
        UserError, match=r"cannot be divided over 5 ranks.*numbers of ranks: 1, 2, 3, 4, 6, 12;"
    ):
        check_ranks(recipe, 5)


LATE = """
import os, sys, time, torch
from pathlib import Path
from diffusion2gan.errors import Failure
from diffusion2gan.runtime.distributed import Flags, connect_ranks
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
        print("TOLD", error, flush=True)
        reported.touch()
        os._exit(0)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    os.environ["DIFFUSION2GAN_RANK_TIMEOUT_S"] = "3"
    try:
        out, _ = done(torchrun(2, tmp_path / "late.py"))
    finally:
        del os.environ["DIFFUSION2GAN_RANK_TIMEOUT_S"]
    assert "TOLD step 2: rank 1 did not take part" in out and "the same command continues" in out


ELSEWHERE = """
import os, sys
from pathlib import Path
from diffusion2gan import cli
os.chdir(Path(__file__).with_name(("here", "there")[int(os.environ["RANK"])]))
cli.main()
"""


@pytest.mark.slow
def test_ranks_that_see_different_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    """Rank 1 finds no run where rank 0 finds one: it is said, and nothing is trained."""
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    alone = [
        sys.executable,
        *map(str, distill_args(folder, tmp_path / "here" / "run", "total_pairs=8")),
    ]
    subprocess.run(alone, check=True, env=environment(), timeout=300)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    process = torchrun(
        2, tmp_path / "elsewhere.py", *distill_args(folder, Path("run"), "total_pairs=8")[2:]
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "rank 0 finds a run with 8 pairs, rank 1 one with 0" in err, err
    assert (
        "All ranks must use the same folder" in err
        and not (tmp_path / "there" / "run" / "log.jsonl").exists()
    )


def test_alone_nothing_is_said() -> None:
    group, layer = Group(Ranks()), torch.nn.Linear(1, 1)
    extra = torch.ones(3)
    (same,), flags = group.sum(layer, [extra], Flags(stop=True))
    assert same is extra and layer.weight.grad is None
    assert flags == Flags(stop=True)
