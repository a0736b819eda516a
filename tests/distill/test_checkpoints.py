"""Which checkpoints a run keeps, that each is enough by itself, and what is said when one is gone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from diffusion2gan.distill import checkpoints
from diffusion2gan.distill.checkpoints import BEST, CHECKPOINT
from diffusion2gan.distill.run import load_student
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.export import export
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.background import Background
from diffusion2gan.teacher.loading import load_teacher

STEPS = 6


@pytest.fixture(scope="module")
def pairs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, teacher = tmp_path_factory.mktemp("pairs"), load_teacher(str(tiny_teacher))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 2, 1.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: [f"a star {i}" for i in indices], spec, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_teacher: Path) -> Recipe:
    """So high a rate that the loss rises after some steps: the best is not the last."""
    return Recipe(
        teacher=str(tiny_teacher),
        loss="mse",
        total_pairs=2 * STEPS,
        batch_size=2,
        learning_rate=3e-3,
        warmup=0.5,
        checkpoint_every_s=1e-9,
        sample_every=10**6,
        keep_checkpoints=3,
        keep_best=True,
        adversarial_weight=0,
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    distill(recipe, pairs, out)
    return out


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_the_last_and_the_best_are_kept(run: Path, recipe: Recipe) -> None:
    assert kept(run) == [
        "checkpoint-000000008.safetensors",
        "checkpoint-000000010.safetensors",
        "checkpoint-000000012.safetensors",
        BEST,
        CHECKPOINT,
    ]
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
    averages = [
        sum(losses[: i + 1]) / (i + 1) for i in range(STEPS)
    ]  # of so few steps: the plain mean
    best = checkpoint.meta(run / BEST)
    assert best["pairs_seen"] == 2 * (1 + min(range(STEPS), key=averages.__getitem__))
    assert checkpoints.average_loss(best) == pytest.approx(min(averages))
    for number in (8, 10, 12):
        assert checkpoint.meta(run / f"checkpoint-{number:09d}.safetensors")["pairs_seen"] == number
    assert (run / "checkpoint-000000012.safetensors").samefile(
        run / CHECKPOINT
    )  # no room of its own


def test_any_checkpoint_is_exported(run: Path, tmp_path: Path) -> None:
    for name, seen in (("checkpoint-000000008.safetensors", 8), (CHECKPOINT, 12)):
        export(run / name, tmp_path / name)
        told = json.loads((tmp_path / name / "diffusion2gan.json").read_text())
        assert told["pairs_seen"] == seen
        weights = load_student(run / name)[1]
        assert all(
            torch.equal(value, weights[key]) for key, value in load_student(run / name)[1].items()
        )
    a, b = (
        load_student(run / name)[1] for name in ("checkpoint-000000008.safetensors", CHECKPOINT)
    )
    assert any(not torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(
        UserError, match=r"has no checkpoint-000000002.safetensors; it has checkpoint-000000008"
    ):
        export(run / "checkpoint-000000002.safetensors", tmp_path / "none")


def test_going_back_to_an_earlier_one_gives_the_same_run(
    run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    """The newest is gone: said, with the way on; after it the run ends with the same bytes."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / CHECKPOINT).unlink()
    with pytest.raises(
        UserError, match=r"has lost checkpoint.safetensors.*mv .*checkpoint-000000012.safetensors"
    ):
        distill(recipe, pairs, out)
    (out / "checkpoint-000000010.safetensors").rename(out / CHECKPOINT)
    distill(recipe, pairs, out)
    for name in (CHECKPOINT, BEST, "log.jsonl", "checkpoint-000000010.safetensors"):
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    (out / "recipe.json").unlink()
    with pytest.raises(UserError, match=r"but no recipe\.json"):
        distill(recipe, pairs, out)


def test_what_a_kill_left_undone_is_made_up_and_the_too_many_go(
    run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (
        out / "checkpoint-000000012.safetensors"
    ).unlink()  # killed between the file and its further names
    distill(recipe, pairs, out)
    assert kept(out) == kept(run)
    distill(recipe.model_copy(update={"keep_checkpoints": 2}), pairs, out)
    assert kept(out) == [
        "checkpoint-000000010.safetensors",
        "checkpoint-000000012.safetensors",
        BEST,
        CHECKPOINT,
    ]
    distill(recipe.model_copy(update={"keep_checkpoints": 1, "keep_best": False}), pairs, out)
    assert kept(out) == [BEST, CHECKPOINT]


def test_what_may_change_when_a_run_goes_on(
    run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    """Both values of each setting are told, and how to allow the harmless; nothing else is allowed."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    other = recipe.model_copy(update={"gradient_accumulation_steps": 2, "learning_rate": 1e-4})
    told = r"gradient_accumulation_steps: 1 in the run, 2 requested.*learning_rate: 0.003 in the run, 0.0001 requested|learning_rate.*gradient_accumulation_steps: 1 in the run"
    with pytest.raises(UserError, match=told) as refused:
        distill(other, pairs, out)
    assert "can be allowed: --allow-change gradient_accumulation_steps." in str(refused.value)
    with pytest.raises(
        UserError, match=r"learning_rate: 0.003 in the run, 0.0001 requested\)"
    ) as refused:
        distill(other, pairs, out, ["gradient_accumulation_steps"])
    assert "gradient_accumulation_steps" not in str(refused.value)
    with pytest.raises(
        UserError,
        match=r"--allow-change learning_rate: only device, gradient_accumulation_steps, .*strategy may change",
    ):
        distill(other, pairs, out, ["gradient_accumulation_steps", "learning_rate"])
    (out / "checkpoint-000000010.safetensors").rename(out / CHECKPOINT)
    distill(
        recipe.model_copy(update={"gradient_accumulation_steps": 2}),
        pairs,
        out,
        ["gradient_accumulation_steps"],
    )
    assert checkpoint.meta(out / CHECKPOINT)["pairs_seen"] == 2 * STEPS
    ours, theirs = (
        checkpoint.unpack("ema", checkpoint.load(f / CHECKPOINT)[0]) for f in (out, run)
    )
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-4


def test_a_disk_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(tmp_path / CHECKPOINT, {"x": torch.ones(2)}, {"pairs_seen": 2})
    checkpoints.keep(tmp_path, Recipe(keep_checkpoints=2))
    copy = tmp_path / "checkpoint-000000002.safetensors"
    assert copy.read_bytes() == (tmp_path / CHECKPOINT).read_bytes() and not copy.samefile(
        tmp_path / CHECKPOINT
    )


def test_what_the_background_raised_is_raised_here() -> None:
    def fail() -> None:
        raise Failure("the disk is full")

    work, gate, done = Background(), threading.Event(), []
    work.start(lambda: done.append(gate.wait(10)))
    assert done == []  # the caller goes on meanwhile
    gate.set()
    work.wait()
    assert done == [True]
    work.start(fail)
    with pytest.raises(Failure, match="disk is full"):
        work.start(lambda: done.append(False))
    work.wait()
    assert done == [True]
