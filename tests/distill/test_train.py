"""The loop: exact resume, refusals, and a loss that falls."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion2gan.cost.distill import dry_run
from diffusion2gan.distill import checkpoints, steps, train
from diffusion2gan.distill.run import CHECKPOINT, Run, initial_weights, load_student, open_run
from diffusion2gan.distill.student import Student
from diffusion2gan.distill.steps import learning_rate, step_seed
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec, open_set
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.teacher.loading import load_teacher

BATCH = 2
STEPS = 10


@pytest.fixture(scope="module")
def pairs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    teacher = load_teacher(str(tiny_teacher))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 7, 0, 2, 1.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: [f"a star {i}" for i in indices], spec, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The paper's loss with a random network; a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("latent_vgg")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LatentLPIPS(VGG(4, (8, 8, 8, 8, 8), 2), [torch.rand(8) for _ in range(5)]).save_pretrained(
            folder
        )
    return Recipe(
        teacher=str(tiny_teacher),
        perceptual=str(folder),
        total_pairs=STEPS * BATCH,
        batch_size=BATCH,
        warmup=0.2,
        ema_decay=0.9,
        checkpoint_every_s=1e-9,
        sample_every=10**6,
        adversarial_weight=0,
    )


@pytest.fixture(scope="module")
def whole_run(recipe: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    distill(recipe, pairs, out)
    return out


def contents(out: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    return (*checkpoint.load(out / CHECKPOINT), (out / "log.jsonl").read_text())


def assert_same(a: Path, b: Path) -> None:
    (tensors_a, meta_a, log_a), (tensors_b, meta_b, log_b) = contents(a), contents(b)
    assert tensors_a.keys() == tensors_b.keys() and meta_a == meta_b and log_a == log_b
    assert [key for key in tensors_a if not torch.equal(tensors_a[key], tensors_b[key])] == []


def stop_before(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Ctrl-C just before the step that would start at `stop` pairs."""
    real = steps.student_step

    def step(run: Run, *rest: Any) -> dict[str, Any]:
        if run.pairs_seen == stop:
            raise KeyboardInterrupt
        return real(run, *rest)

    monkeypatch.setattr(steps, "student_step", step)


def test_the_student_is_born_as_the_teacher_at_t(
    tiny_teacher: Path, sd_style_teacher: Path
) -> None:
    for folder in (tiny_teacher, sd_style_teacher):
        teacher = load_teacher(str(folder))
        noise, cond = (
            noise_from_seeds([1, 2], teacher.latent_shape),
            teacher.encode(["a star", "two rings"]),
        )
        student = Student(teacher)
        latents = student(noise, cond)
        assert torch.equal(latents, teacher.denoise(noise, 999, cond)) and latents.requires_grad
        ours, theirs = dict(student.named_parameters()), dict(teacher.network.named_parameters())
        assert len(ours) == len(theirs) and all(p.requires_grad for p in ours.values())
        latents.square().sum().backward()
        assert all(p.grad is None and not p.requires_grad for p in theirs.values())


def test_a_run_writes_what_it_saw(whole_run: Path, recipe: Recipe) -> None:
    tensors, meta, log = contents(whole_run)
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["pairs_seen"] for line in lines] == list(range(BATCH, STEPS * BATCH + 1, BATCH))
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert (
        meta["pairs_seen"] == STEPS * BATCH
        and meta["num_updates"] == STEPS
        and meta["health"]["steps"] == STEPS
    )
    assert not [key for key in tensors if key.startswith("discriminator")]  # none is asked for
    moved = [key for key in tensors if key.startswith("student/")]
    assert any(
        not torch.equal(tensors[key], tensors[key.replace("student/", "ema/")]) for key in moved
    )
    assert [p.name for p in (whole_run / "samples").iterdir()] == ["000000020.png"]
    teacher, average, described = load_student(whole_run)
    assert described["pairs_seen"] == STEPS * BATCH and described["recipe"] == recipe.model_dump()
    assert average.keys() == teacher.network.state_dict().keys()


def test_one_seed_one_run_another_seed_another(
    whole_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    distill(recipe, pairs, tmp_path / "again")
    assert_same(whole_run, tmp_path / "again")
    short = recipe.model_copy(update={"total_pairs": BATCH, "seed": 1})
    distill(short, pairs, tmp_path / "other")
    assert contents(tmp_path / "other")[2].splitlines()[0] != contents(whole_run)[2].splitlines()[0]


def test_stopped_and_resumed_is_bit_for_bit_uninterrupted(
    whole_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_before(patch, 5 * BATCH)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, pairs, out)
    assert checkpoint.load(out / CHECKPOINT)[1]["pairs_seen"] == 5 * BATCH
    with (out / "log.jsonl").open(
        "a"
    ) as log:  # it went on past its checkpoint before it died, in mid-line
        log.write('{"pairs_seen": 12, "loss": 9.0, "grad_norm": 9.0}\n{"pairs_se')
    distill(recipe.model_copy(update={"checkpoint_every_s": 100.0, "sample_every": 7}), pairs, out)
    assert_same(whole_run, out)
    distill(recipe, pairs, out)  # nothing left to do
    assert_same(whole_run, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_mid_step_saves_after_it_and_resumes_exactly(
    whole_run: Path,
    recipe: Recipe,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    out, slow = tmp_path / "run", recipe.model_copy(update={"checkpoint_every_s": 1e6})
    real, write = steps.learning_rate, checkpoints.write

    def preempted_again(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(*args)

    def signalled(recipe: Recipe, pairs_seen: int) -> float:
        if pairs_seen == 4 * BATCH:
            os.kill(os.getpid(), number)
        return real(recipe, pairs_seen)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "learning_rate", signalled)
        patch.setattr(checkpoints, "write", preempted_again)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as end:
            distill(slow, pairs, out)
    assert number == signal.SIGINT or end.value.code == 0  # preempted: no failure
    assert checkpoint.load(out / CHECKPOINT)[1]["pairs_seen"] == 5 * BATCH
    distill(slow, pairs, out)
    assert_same(whole_run, out)


def test_stopped_before_any_checkpoint_it_starts_afresh(
    whole_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, slow = tmp_path / "run", recipe.model_copy(update={"checkpoint_every_s": 1e6})
    with monkeypatch.context() as patch:
        stop_before(patch, 2 * BATCH)
        with pytest.raises(KeyboardInterrupt):
            distill(slow, pairs, out)
    assert not (out / CHECKPOINT).exists() and (out / "log.jsonl").exists()
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_student(out)
    distill(slow, pairs, out)
    assert_same(whole_run, out)


def test_the_transforms_randomness_depends_on_the_seed_and_the_step() -> None:
    """torch's CPU generator reads 32 bits of a seed: the two must be mixed into those."""
    seeds = [step_seed(seed, seen) for seed in (0, 1, 2**31 - 1) for seen in range(0, 20_000, 32)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
    first = {torch.rand((), generator=torch.Generator().manual_seed(s)).item() for s in seeds[:50]}
    assert len(first) == 50


def test_the_learning_rate_rises_then_falls() -> None:
    recipe = Recipe(total_pairs=1000, batch_size=10, warmup=0.1, learning_rate=2e-3)
    rates = [learning_rate(recipe, seen) for seen in range(0, 1000, 10)]
    assert rates[:10] == pytest.approx([2e-3 * (i + 1) / 10 for i in range(10)])
    for i, rate in enumerate(rates[10:]):
        assert rate == pytest.approx(2e-3 * (0.05 + 0.95 * (1 + math.cos(math.pi * i / 90)) / 2))
    assert (
        rates[-1] < 2e-3 * 0.06
        and learning_rate(recipe.model_copy(update={"warmup": 0.0}), 0) == 2e-3
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate: 0\.0003 in the run, 0\.001 requested"),
        (
            {"loss": "mse", "seed": 4},
            "loss: 'e_latent_lpips' in the run, 'mse' requested; seed: 0 in the run, 4 requested",
        ),
        ({"total_pairs": 22}, "total_pairs: 20 in the run, 22 requested"),
    ],
)
def test_a_folder_of_another_recipe_is_refused(
    whole_run: Path, recipe: Recipe, pairs: Path, change: dict[str, Any], told: str
) -> None:
    before = (whole_run / CHECKPOINT).stat().st_mtime_ns
    with pytest.raises(UserError, match=told):
        distill(recipe.model_copy(update=change), pairs, whole_run)
    assert (whole_run / CHECKPOINT).stat().st_mtime_ns == before


def test_pairs_of_another_teacher_or_size_are_refused(
    recipe: Recipe, pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher))
    for changes, told in [
        (
            {"revision": "0123", "teacher": "another"},
            r"'another' \(weights 0123\).*" + teacher.revision,
        ),
        ({"latent_shape": (4, 8, 8)}, r"\(4, 8, 8\), the teacher's have \(4, 16, 16\)"),
    ]:
        folder = tmp_path / next(iter(changes))
        values: dict[str, Any] = {
            "teacher": teacher.name,
            "revision": teacher.revision,
            "prompts": "p",
            "count": 1,
            "seed": 0,
            "num_inference_steps": 1,
            "guidance_scale": 1.0,
            "latent_shape": teacher.latent_shape,
            "shard_size": 1,
        }
        spec = PairsSpec(**(values | changes))
        make_pairs(
            teacher, lambda indices: ["a"] * len(indices), spec, folder
        ) if "revision" in changes else None
        with pytest.raises(UserError, match=told):
            train.check_pairs(spec, teacher, folder)
    with pytest.raises(UserError, match="Make pairs with this teacher"):
        distill(recipe, tmp_path / "revision", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_pairs_are_refused_on_resume(
    whole_run: Path, recipe: Recipe, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 2, 9, 1, 1.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: ["a"] * len(indices), spec, tmp_path)
    with pytest.raises(UserError, match="other pairs"):
        distill(recipe, tmp_path, whole_run)


def test_the_loss_falls(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    """Seven pairs are learned by heart: towards the teacher's latents, in the averaged weights too."""
    steps = 40
    mse = recipe.model_copy(
        update={
            "loss": "mse",
            "total_pairs": steps * 7,
            "batch_size": 7,
            "learning_rate": 2e-3,
            "ema_decay": 0.8,
            "checkpoint_every_s": 1e6,
        }
    )
    distill(mse, pairs, tmp_path)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert len(losses) == steps and losses[-1] < 0.5 * losses[0]


def poison(monkeypatch: pytest.MonkeyPatch, bad: range) -> None:
    """The distance's calls of these numbers, counted from 1, are infinite."""
    real: Callable[..., Any] = train.build_distance
    calls = 0

    def poisoned(*arguments: Any) -> Any:
        distance = real(*arguments)

        def one(*arguments: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return distance(*arguments) * (float("inf") if calls in bad else 1.0)

        return one

    monkeypatch.setattr(train, "build_distance", poisoned)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = recipe.model_copy(update={"total_pairs": 14 * BATCH})
    poison(monkeypatch, range(3, 12))  # nine in a row are borne
    distill(long, pairs, tmp_path)
    tensors, meta, log = contents(tmp_path)
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, *range(1, 10), 9, 9, 9]
    assert [line["loss"] is None for line in lines] == [2 < i < 12 for i in range(1, 15)]
    assert (
        meta["num_updates"] == 5
        and meta["health"]["skipped"] == 9
        and meta["health"]["skipped_in_a_row"] == 0
    )
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_ten_skipped_in_a_row_are_a_failure(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = recipe.model_copy(update={"total_pairs": 14 * BATCH})
    distill(long, pairs, tmp_path / "well")
    poison(monkeypatch, range(3, 99))
    with pytest.raises(
        Failure,
        match=r"not finite in 10 steps in a row, up to 24 pairs .*intact; lower learning_rate",
    ):
        distill(long, pairs, tmp_path / "run")
    tensors, meta, _ = contents(tmp_path / "run")
    assert meta["pairs_seen"] == 4 and meta["health"]["skipped"] == 0  # the last good one
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
    monkeypatch.undo()
    distill(long, pairs, tmp_path / "run")
    assert_same(tmp_path / "well", tmp_path / "run")


def test_a_run_may_start_from_anothers_student(
    whole_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    """Its first loss is that student's, not the teacher's; resumed, it no longer needs the other run."""
    other = tmp_path / "other"
    shutil.copytree(whole_run, other)
    later = recipe.model_copy(update={"init_from": str(other), "total_pairs": BATCH, "seed": 3})
    run = Run(later, load_teacher(later.teacher))
    open_run(run, tmp_path / "run", open_set(pairs))
    weights = load_student(whole_run)[1]
    for now in (run.student.trained.state_dict(), run.ema.shadow):
        assert all(torch.equal(now[key], value) for key, value in weights.items())
    distill(later, pairs, tmp_path / "run")
    shutil.rmtree(other)
    distill(later, pairs, tmp_path / "run")


def test_a_start_that_is_no_run_or_anothers_teachers_is_refused(
    whole_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, sd_style_teacher: Path
) -> None:
    later = recipe.model_copy(update={"init_from": str(tmp_path / "none")})
    with pytest.raises(UserError, match="contains no run"):
        distill(later, pairs, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()
    with pytest.raises(UserError, match=r"init_from = .* was distilled from weights"):
        initial_weights(
            recipe.model_copy(update={"init_from": str(whole_run)}),
            load_teacher(str(sd_style_teacher)),
        )
    with pytest.raises(UserError, match=r"init_from = .* has lora_rank = 0, this recipe 2"):
        initial_weights(
            recipe.model_copy(update={"init_from": str(whole_run), "lora_rank": 2}),
            load_teacher(recipe.teacher),
        )


def test_a_damaged_checkpoint_is_a_failure(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    short = recipe.model_copy(update={"total_pairs": BATCH})
    distill(short, pairs, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Failure, match="damaged"):
        distill(short, pairs, tmp_path)


def test_the_average_is_lent_and_given_back(recipe: Recipe) -> None:
    run = Run(recipe, load_teacher(recipe.teacher))
    run.ema.shadow = {key: torch.zeros_like(value) for key, value in run.ema.shadow.items()}
    before = {key: value.clone() for key, value in run.student.network.state_dict().items()}
    noise, cond = noise_from_seeds([0], (4, 16, 16)), run.teacher.encode(["a"])
    with torch.no_grad(), run.ema_weights():
        lent = run.student(noise, cond)
    assert torch.allclose(
        lent, run.teacher.alpha_bar(999) ** 0.5 * noise
    )  # a network of zeros: v = 0
    assert all(
        torch.equal(before[key], value) for key, value in run.student.network.state_dict().items()
    )


def test_a_dry_run_trains_nothing(recipe: Recipe, pairs: Path) -> None:
    told = dry_run(recipe, pairs)
    assert told["steps"] == STEPS
    assert told["student_parameters"] == sum(
        p.numel() for p in load_teacher(recipe.teacher).network.parameters()
    )
