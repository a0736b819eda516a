"""The two steps against the paper's formulas, and the loop they make: exact, resumable, guarded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.adversarial.losses import r1_penalty
from diffusion2gan.cost.distill import dry_run
from diffusion2gan.distill import health, steps
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import CHECKPOINT, Run
from diffusion2gan.distill.student import Float32Conv2d, Student
from diffusion2gan.distill.steps import (
    discriminator_step,
    frozen,
    micro_batches,
    step,
    step_seed,
    student_step,
)
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher

BATCH = 4
STEPS = 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket pipeline with a much smaller network, all random."""
    return tiny_pocket.save(tmp_path_factory.mktemp("small_teacher"))


def make(teacher_folder: Path, folder: Path, prompts: list[str]) -> Path:
    teacher = load_teacher(str(teacher_folder))
    spec = PairsSpec(
        teacher.name, teacher.revision, "words", 16, 0, 2, 1.0, teacher.latent_shape, 8
    )
    make_pairs(teacher, lambda indices: [prompts[i % len(prompts)] for i in indices], spec, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(
        teacher_folder, tmp_path_factory.mktemp("pairs"), ["a star", "two rings", "a blue heart"]
    )


@pytest.fixture(scope="module")
def recipe(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The whole method; a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("latent_vgg")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LatentLPIPS(VGG(4, (8, 8, 8, 8, 8), 2), [torch.rand(8) for _ in range(5)]).save_pretrained(
            folder
        )
    return Recipe(
        teacher=str(teacher_folder),
        perceptual=str(folder),
        total_pairs=STEPS * BATCH,
        batch_size=BATCH,
        adversarial_weight=0.5,
        discriminator_warmup=2 * BATCH,
        r1_every=3,
        r1_weight=1e-3,
        mix_share=0.4,
        checkpoint_every_s=1e-9,
        sample_every=10**6,
    )


@pytest.fixture(scope="module")
def whole_run(recipe: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    distill(recipe, pairs, out)
    return out


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(a: Path, b: Path) -> None:
    (tensors_a, meta_a), (tensors_b, meta_b) = (
        checkpoint.load(a / CHECKPOINT),
        checkpoint.load(b / CHECKPOINT),
    )
    assert tensors_a.keys() == tensors_b.keys() and meta_a == meta_b and log_of(a) == log_of(b)
    assert [key for key in tensors_a if not torch.equal(tensors_a[key], tensors_b[key])] == []


def begin(recipe: Recipe, pairs: Path, **changes: Any) -> tuple[Run, Pairs, Any]:
    """A run past its warm-up in which every convolution of D says something, a batch, the distance."""
    changed = recipe.model_copy(
        update={"discriminator_warmup": 0, "max_grad_norm": 1e9, "warmup": 0.0} | changes
    )
    run = Run(changed, load_teacher(recipe.teacher))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.discriminator.parameters() if run.discriminator else ():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = next(PairReader(pairs, 0).batches(changed.batch_size))
    return run, batch, build_distance(changed, CPU)


def gradients(module: torch.nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    a, b = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (ours, theirs))
    assert float((a - b).norm() / b.norm()) < tolerance


def over_heads(logits: list[Tensor], sign: float) -> Tensor:
    return sum((F.softplus(sign * x).mean() for x in logits), torch.zeros(())) / len(logits)


def test_the_students_gradient_is_the_papers_objective(recipe: Recipe, pairs: Path) -> None:
    """∇(E-LatentLPIPS + λ·softplus(−D)), written out."""
    run, batch, distance = begin(recipe, pairs)
    (part,), before = micro_batches(run, batch), weights(run.discriminator)
    latents = run.student(part.noise, part.cond)
    generator = torch.Generator().manual_seed(step_seed(recipe.seed, 0))
    loss = distance(latents, batch.latents, generator).mean()
    loss = loss + 0.5 * over_heads(run.discriminator(part.noise, part.cond, latents), -1)
    expected = torch.autograd.grad(loss, list(run.student.parameters()), allow_unused=True)
    entry, _ = student_step(run, [part], distance)
    assert_near(gradients(run.student), [g for g in expected if g is not None], 1e-5)
    assert entry["loss"] + 0.5 * entry["gan_loss"] == pytest.approx(float(loss.detach()))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run.discriminator), strict=True))
    assert all(p.grad is None and p.requires_grad for p in run.discriminator.parameters())


def test_the_discriminators_gradient_is_the_papers_too(recipe: Recipe, pairs: Path) -> None:
    """∇(softplus(−D(real)) + softplus(D(fake)) + 3·γ/2·‖∇_x ΣD(real)‖²), real and fake apart and no fake mixed."""
    run, batch, _ = begin(recipe, pairs, mix_share=0.0, r1_weight=0.1)
    (part,), before = micro_batches(run, batch), weights(run.student)
    made = run.discriminator
    with torch.no_grad():
        fake = run.student(part.noise, part.cond)
    generator = torch.Generator().manual_seed(step_seed(recipe.seed, 0, steps.DISCRIMINATOR))
    torch.rand((), generator=generator), torch.randperm(4, generator=generator)  # mix_and_match's
    row = int(torch.randint(4, (), generator=generator))
    one = slice(row, row + 1)
    players = over_heads(made(part.noise, part.cond, part.latents), -1) + over_heads(
        made(part.noise, part.cond, fake), 1
    )
    penalty = r1_penalty(made, part.noise[one], part.cond.rows(one), part.latents[one])
    loss = players + 3 * 0.1 / 2 * penalty
    expected = torch.autograd.grad(loss, list(made.parameters()))
    entry = discriminator_step(run, [part])
    assert_near(gradients(made), list(expected), 1e-5)
    assert entry["d_loss"] == pytest.approx(float(players.detach()), rel=1e-5)
    assert entry["r1"] == pytest.approx(float(penalty.detach()), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run.student), strict=True))


@pytest.mark.parametrize(
    ("gradient_accumulation_steps", "spectral_norm"), [(2, False), (4, False), (4, True)]
)
def test_a_batch_in_parts_is_the_same_update(
    recipe: Recipe, pairs: Path, gradient_accumulation_steps: int, spectral_norm: bool
) -> None:
    changed = recipe.model_copy(update={"spectral_norm": spectral_norm})
    (whole, batch, distance), (cut, _, _) = (
        begin(changed, pairs),
        begin(changed, pairs, gradient_accumulation_steps=gradient_accumulation_steps),
    )
    (entry, _), (entry_cut, _) = step(whole, batch, distance), step(cut, batch, distance)
    assert_near(gradients(cut.discriminator), gradients(whole.discriminator))
    assert_near(gradients(cut.student), gradients(whole.student))
    for key, value in entry.items():
        assert entry_cut[key] == pytest.approx(value, rel=1e-4), key
    assert entry["accuracy_mixed"] is not None and "r1" in entry
    a, b = (dict(run.discriminator.named_buffers()) for run in (whole, cut))
    assert bool(a) == spectral_norm and all(
        torch.equal(a[key], b[key]) for key in a
    )  # the estimates moved on alike


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_steps_under_autocast(recipe: Recipe, pairs: Path, checkpointing: bool) -> None:
    """As on cuda, tried on the CPU: near the float32 step, R1 wholly in float32."""
    changes = {"precision": "bfloat16", "gradient_checkpointing": checkpointing}
    (exact, batch, distance), (reduced, _, _) = (
        begin(recipe, pairs),
        begin(recipe, pairs, **changes),
    )
    (expected, _), (found, _) = step(exact, batch, distance), step(reduced, batch, distance)
    assert (
        found["r1"] == pytest.approx(expected["r1"], rel=1e-4)
        and found["d_loss"] != expected["d_loss"]
    )
    for key in ("loss", "gan_loss", "d_loss"):
        assert found[key] == pytest.approx(expected[key], rel=0.02), key
    for module, other in (
        (reduced.student, exact.student),
        (reduced.discriminator, exact.discriminator),
    ):
        assert_near(gradients(module), gradients(other), 0.1)
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_warnings_are_said_logged_and_stand_in_the_live_line(
    recipe: Recipe,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(health, "MIN_VALUES", 2)
    monkeypatch.setitem(health.REMEDIES, health.D_AT_CHANCE, "a remedy")
    monkeypatch.setattr(health, "accuracy", lambda logits, real, rows=None: 0.5)
    distill(
        recipe.model_copy(update={"total_pairs": 4 * BATCH, "discriminator_warmup": 0}),
        pairs,
        tmp_path,
    )
    said = [line.get("warnings", []) for line in log_of(tmp_path)]
    assert [f"{health.D_AT_CHANCE}: a remedy" in warnings for warnings in said] == [
        False,
        True,
        False,
        False,
    ]
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"warning: {health.D_AT_CHANCE}: a remedy" in told
        and f"· {health.D_AT_CHANCE}" in told.split("16/16")[1]
    )
    assert "· ETA 0:00 loss" in told and "D accuracy 50% real 50% fake" in told


def test_a_discriminator_that_the_student_never_meets_is_told(
    recipe: Recipe, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = recipe.model_copy(
        update={"total_pairs": BATCH, "gan_start_pairs": BATCH, "discriminator_warmup": 0}
    )
    distill(short, pairs, tmp_path)
    assert "would begin at pair 4 (gan_start_pairs 4" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_ten_broken_steps_in_a_row_name_the_player(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, player: str
) -> None:
    name = "student_loss" if player == "student" else "discriminator_loss"
    real = getattr(steps, name)
    monkeypatch.setattr(steps, name, lambda *logits: real(*logits) * float("nan"))
    changed = recipe.model_copy(update={"checkpoint_every_s": 1e6, "discriminator_warmup": 0})
    with pytest.raises(
        Failure,
        match=rf"the {player}'s gradient was not finite in 10 .*No checkpoint was written yet",
    ):
        distill(changed, pairs, tmp_path)


def test_real_and_fake_pass_in_one_forward(
    recipe: Recipe, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, batch, _ = begin(recipe, pairs, r1_weight=0.0)
    seen: list[tuple[Tensor, Conditioning, Tensor]] = []
    real = run.discriminator.forward

    def forward(*arguments: Any) -> list[Tensor]:
        seen.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(run.discriminator, "forward", forward)
    (part,) = micro_batches(run, batch)
    discriminator_step(run, [part])
    ((noise, cond, latents),) = seen
    assert torch.equal(noise, torch.cat([part.noise] * 2)) and torch.equal(
        latents[:4], part.latents
    )
    assert torch.equal(cond.prompt_embeds, torch.cat([part.cond.prompt_embeds] * 2))
    mixed = [any(torch.equal(row, other) for other in part.latents) for row in latents[4:]]
    assert sum(mixed) in (1, 2)  # .4 of 4


def test_what_a_run_logs(whole_run: Path) -> None:
    lines = log_of(whole_run)
    assert [("gan_loss" in line) for line in lines] == [False] * 2 + [True] * (
        STEPS - 2
    )  # the warm-up
    assert [i for i, line in enumerate(lines) if "r1" in line] == list(range(0, STEPS, 3))
    for line in lines:
        assert len(line["logits_real"]) == len(line["logits_fake"]) == 6
        assert all(0 <= line[f"accuracy_{kind}"] <= 1 for kind in ("real", "fake", "mixed"))
        assert line["d_grad_norm"] > 0 and line["latent_std_ratio"] > 0 and line["skipped"] == 0


def test_one_seed_one_run_bit_for_bit(
    whole_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    distill(recipe, pairs, tmp_path / "again")
    assert_same(whole_run, tmp_path / "again")


def test_ten_steps_a_kill_and_ten_more_are_twenty(
    whole_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two players' steps of the eleventh."""
    real = steps.student_step

    def killed(run: Run, *rest: Any) -> dict[str, Any]:
        if run.pairs_seen == 10 * BATCH:
            raise KeyboardInterrupt
        return real(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "student_step", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, pairs, tmp_path / "run")
    tensors, meta = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert meta["pairs_seen"] == 10 * BATCH and meta["health"]["counts"]["accuracy_real"] == 10
    assert {key.split("/")[0] for key in tensors} == {
        "student",
        "adam",
        "ema",
        "discriminator",
        "discriminator_adam",
    }
    distill(recipe, pairs, tmp_path / "run")
    assert_same(whole_run, tmp_path / "run")


def test_in_the_warm_up_the_student_feels_nothing(recipe: Recipe, pairs: Path) -> None:
    students = []
    for changes in (
        {"adversarial_weight": 0.0},
        {"discriminator_warmup": 8},
        {"discriminator_warmup": 4},
    ):
        run, batch, distance = begin(recipe, pairs, **changes)
        for _ in range(2):
            step(run, batch, distance)
        students.append(weights(run.student))
    assert all(torch.equal(a, b) for a, b in zip(students[0], students[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(students[0], students[2], strict=True))


def test_before_its_time_the_discriminator_stands_still(recipe: Recipe, pairs: Path) -> None:
    run, batch, distance = begin(
        recipe, pairs, gan_start_pairs=2 * BATCH, discriminator_warmup=BATCH
    )
    alone = begin(recipe, pairs, adversarial_weight=0.0)[0]
    before = weights(run.discriminator)
    for _ in range(2):
        entry, _ = step(run, batch, distance)
        step(alone, batch, distance)
        assert "d_loss" not in entry and "gan_loss" not in entry
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run.discriminator), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(weights(alone.student), weights(run.student), strict=True)
    )
    (learning, _), (both, _) = step(run, batch, distance), step(run, batch, distance)
    assert "d_loss" in learning and "gan_loss" not in learning and "gan_loss" in both


def test_without_a_weight_no_discriminator_is_built(recipe: Recipe, pairs: Path) -> None:
    run, batch, distance = begin(recipe, pairs, adversarial_weight=0.0)
    assert run.discriminator is None and run.discriminator_optimizer is None
    assert not {
        key
        for key in step(run, batch, distance)[0]
        if key.startswith(("d_", "gan", "accuracy", "logits", "r1"))
    }


@pytest.mark.slow
def test_the_discriminator_learns_to_tell(recipe: Recipe, pairs: Path) -> None:
    """A student that stands still is found out, and so are real latents of another prompt."""
    run, batch, distance = begin(
        recipe,
        pairs,
        learning_rate=1e-9,
        discriminator_learning_rate=3e-3,
        batch_size=8,
        total_pairs=10**6,
        r1_weight=0.0,
    )
    for _ in range(60):
        entry, _ = step(run, batch, distance)
    assert entry["accuracy_real"] > 0.9 and entry["accuracy_fake"] > 0.9 and entry["d_loss"] < 0.7


def test_a_step_of_d_that_is_not_finite_is_skipped(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.r1_penalty
    monkeypatch.setattr(steps, "r1_penalty", lambda *arguments: real(*arguments) * float("nan"))
    distill(recipe.model_copy(update={"total_pairs": 4 * BATCH}), pairs, tmp_path)
    lines = log_of(tmp_path)
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2] and lines[0]["d_grad_norm"] is None
    tensors, _ = checkpoint.load(tmp_path / CHECKPOINT)
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
    assert float(tensors["discriminator_adam/0/step"]) == 2 and float(tensors["adam/0/step"]) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"discriminator": "patch"}, "discriminator: 'diffusion' in the run, 'patch' requested"),
        ({"multi_scale_output": False}, "multi_scale_output: True in the run, False requested"),
        ({"adversarial_weight": 0.0}, r"adversarial_weight: 0\.5 in the run, 0\.0 requested"),
    ],
)
def test_another_discriminator_does_not_resume(
    whole_run: Path, recipe: Recipe, pairs: Path, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        distill(recipe.model_copy(update=change), pairs, whole_run)


def test_pairs_without_prompts_are_refused(
    recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    folder = make(teacher_folder, tmp_path / "pairs", [""])
    with pytest.raises(
        UserError,
        match=r"have no prompts, and the discriminator reads them.*adversarial_weight=0",
    ):
        distill(recipe, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert (
        dry_run(recipe.model_copy(update={"adversarial_weight": 0.0}), folder)[
            "discriminator_parameters"
        ]
        == 0
    )
    assert (
        dry_run(recipe.model_copy(update={"discriminator": "patch"}), folder)[
            "discriminator_parameters"
        ]
        > 0
    )
    with pytest.raises(
        UserError,
        match="discriminator_timestep = 5000 is too large: the teacher's timesteps are 0 to 999",
    ):
        dry_run(recipe.model_copy(update={"discriminator_timestep": 5000}), folder)


def test_some_pairs_without_prompts_are_told(
    recipe: Recipe, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(teacher_folder, tmp_path / "pairs", ["a star", " "])
    dry_run(recipe, folder)
    assert "warning: 8 of the first 16 pairs in" in " ".join(capsys.readouterr().err.split())


def test_a_device_that_is_not_here_is_refused(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    for name in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"device '{name}' is not available .*; set device=cpu"):
            distill(recipe.model_copy(update={"device": name}), pairs, tmp_path / "run")


@torch.no_grad()
def test_the_output_layer_stays_in_float32_under_autocast(teacher_folder: Path) -> None:
    """On the CPU, where autocast can be tried everywhere."""
    teacher = load_teacher(str(teacher_folder))
    student = Student(teacher)
    layer = student.network.conv_out
    assert isinstance(layer, Float32Conv2d)
    x = torch.randn(2, 8, 16, 16)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), teacher.network.conv_out(x).float()) is False
        latents = student(torch.randn(2, 4, 16, 16), teacher.encode(["a", "b"]))
    assert torch.equal(layer(x), teacher.network.conv_out(x)) and torch.equal(seen[0], layer(x))
    assert latents.dtype == torch.float32 and not torch.equal(seen[1], seen[1].bfloat16().float())
