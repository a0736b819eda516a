"""Which checkpoints a run keeps, that each is complete, and the messages when one is missing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from distill.run_logs import repeatable_text

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
BATCH = 2


@pytest.fixture(scope="module")
def pairs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    teacher = load_teacher(str(tiny_teacher))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 2, 1.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: [f"a star {i}" for i in indices], spec, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_teacher: Path) -> Recipe:
    """The learning rate is so high that the loss rises: the best checkpoint is not the last."""
    return Recipe(
        teacher=str(tiny_teacher),
        loss="mse",
        total_pairs=STEPS * BATCH,
        batch_size=BATCH,
        learning_rate=3e-3,
        warmup=0.5,
        checkpoint_every_s=1e-9,
        sample_every=10**6,
        keep_checkpoints=3,
        keep_best=True,
        adversarial_weight=0,
    )


@pytest.fixture(scope="module")
def finished_run(recipe: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    distill(recipe, pairs, out)
    return out


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    return out


def numbered(pairs_seen: int) -> str:
    return f"checkpoint-{pairs_seen:09d}.safetensors"


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_last_and_best_checkpoints_are_kept(finished_run: Path) -> None:
    expected = [numbered(8), numbered(10), numbered(12), BEST, CHECKPOINT]
    assert checkpoint_names(finished_run) == expected

    # The best has the lowest running average, which is the plain mean of so few steps
    lines = (finished_run / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    averages = [sum(losses[: i + 1]) / (i + 1) for i in range(STEPS)]
    best_step = 1 + min(range(STEPS), key=averages.__getitem__)
    best = checkpoint.meta(finished_run / BEST)
    assert best["pairs_seen"] == BATCH * best_step
    assert checkpoints.average_loss(best) == pytest.approx(min(averages))

    # The last ones are links to complete files
    for pairs_seen in (8, 10, 12):
        assert checkpoint.meta(finished_run / numbered(pairs_seen))["pairs_seen"] == pairs_seen
    assert (finished_run / numbered(12)).samefile(finished_run / CHECKPOINT)


def test_any_checkpoint_can_be_exported(finished_run: Path, tmp_path: Path) -> None:
    for name, pairs_seen in ((numbered(8), 8), (CHECKPOINT, 12)):
        export(finished_run / name, tmp_path / name)
        described = json.loads((tmp_path / name / "diffusion2gan.json").read_text())
        assert described["pairs_seen"] == pairs_seen

    earlier = load_student(finished_run / numbered(8))[1]
    newest = load_student(finished_run / CHECKPOINT)[1]
    assert any(not torch.equal(earlier[key], newest[key]) for key in earlier)

    with pytest.raises(
        UserError, match=r"has no checkpoint-000000002.safetensors; it has checkpoint-000000008"
    ):
        export(finished_run / numbered(2), tmp_path / "none")


def test_going_back_to_an_earlier_one_gives_the_same_run(
    finished_run: Path, run_copy: Path, recipe: Recipe, pairs: Path
) -> None:
    # The newest is missing: refused, with the command that goes back
    (run_copy / CHECKPOINT).unlink()
    with pytest.raises(
        UserError, match=r"lacks checkpoint.safetensors.*mv .*checkpoint-000000012.safetensors"
    ):
        distill(recipe, pairs, run_copy)

    # Resumed from an earlier one, the run ends with the same bytes
    (run_copy / numbered(10)).rename(run_copy / CHECKPOINT)
    distill(recipe, pairs, run_copy)
    for name in (CHECKPOINT, BEST, numbered(10)):
        assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes(), name
    assert repeatable_text(run_copy) == repeatable_text(finished_run)

    # Without its settings it is refused
    (run_copy / "recipe.json").unlink()
    with pytest.raises(UserError, match=r"but no recipe\.json"):
        distill(recipe, pairs, run_copy)


def test_resuming_links_and_removes_checkpoints_that_a_killed_run_did_not(
    finished_run: Path, run_copy: Path, recipe: Recipe, pairs: Path
) -> None:
    # Killed between writing the newest and linking its other name
    (run_copy / numbered(12)).unlink()
    distill(recipe, pairs, run_copy)
    assert checkpoint_names(run_copy) == checkpoint_names(finished_run)

    # Resumed with other settings of what is kept
    distill(recipe.model_copy(update={"keep_checkpoints": 2}), pairs, run_copy)
    assert checkpoint_names(run_copy) == [numbered(10), numbered(12), BEST, CHECKPOINT]
    distill(recipe.model_copy(update={"keep_checkpoints": 1, "keep_best": False}), pairs, run_copy)
    assert checkpoint_names(run_copy) == [BEST, CHECKPOINT]


def test_changed_settings_are_refused_unless_they_change_rounding_alone_and_are_allowed(
    finished_run: Path, run_copy: Path, recipe: Recipe, pairs: Path
) -> None:
    changed = recipe.model_copy(update={"gradient_accumulation_steps": 2, "learning_rate": 1e-4})

    # Both are reported with both values; the one that can be allowed with its option
    with pytest.raises(UserError) as error:
        distill(changed, pairs, run_copy)
    message = str(error.value)
    assert "gradient_accumulation_steps: 1 in the run, 2 requested" in message
    assert "learning_rate: 0.003 in the run, 0.0001 requested" in message
    assert "can be allowed: --allow-change gradient_accumulation_steps." in message

    # With that option, the other one remains
    with pytest.raises(
        UserError, match=r"learning_rate: 0.003 in the run, 0.0001 requested\)"
    ) as error:
        distill(changed, pairs, run_copy, ["gradient_accumulation_steps"])
    assert "gradient_accumulation_steps" not in str(error.value)

    # It cannot be allowed
    with pytest.raises(
        UserError,
        match=r"--allow-change learning_rate: only device, gradient_accumulation_steps, .*strategy "
        "may change",
    ):
        distill(changed, pairs, run_copy, ["gradient_accumulation_steps", "learning_rate"])

    # The allowed change gives nearly the same run
    (run_copy / numbered(10)).rename(run_copy / CHECKPOINT)
    accumulated = recipe.model_copy(update={"gradient_accumulation_steps": 2})
    distill(accumulated, pairs, run_copy, ["gradient_accumulation_steps"])
    assert checkpoint.meta(run_copy / CHECKPOINT)["pairs_seen"] == STEPS * BATCH
    expected = checkpoint.unpack("ema", checkpoint.load(finished_run / CHECKPOINT)[0])
    found = checkpoint.unpack("ema", checkpoint.load(run_copy / CHECKPOINT)[0])
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) < 1e-4, key


def test_disk_without_hard_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "hard links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(tmp_path / CHECKPOINT, {"x": torch.ones(2)}, {"pairs_seen": 2})
    checkpoints.keep(tmp_path, Recipe(keep_checkpoints=2))

    copy = tmp_path / numbered(2)
    assert copy.read_bytes() == (tmp_path / CHECKPOINT).read_bytes()
    assert not copy.samefile(tmp_path / CHECKPOINT)


def test_error_in_a_background_job_is_raised_by_the_next_call() -> None:
    background = Background()
    gate = threading.Event()
    results: list[bool] = []

    def fail() -> None:
        raise Failure("the disk is full")

    # The caller goes on while the job runs
    background.start(lambda: results.append(gate.wait(10)))
    assert results == []
    gate.set()
    background.wait()
    assert results == [True]

    # The next job is not started after a failure
    background.start(fail)
    with pytest.raises(Failure, match="disk is full"):
        background.start(lambda: results.append(False))
    background.wait()
    assert results == [True]
