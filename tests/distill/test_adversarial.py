"""The two updates against the paper's formulas, and the adversarial training loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
import torch
import torch.nn.functional as F
from distill.run_logs import read_log, repeatable_text
from torch import Tensor, nn

from diffusion2gan.adversarial.losses import r1_penalty
from diffusion2gan.cost.distill import dry_run
from diffusion2gan.distill import health, steps
from diffusion2gan.distill.losses import Distance, build_distance
from diffusion2gan.distill.metrics import StepMetrics
from diffusion2gan.distill.run import CHECKPOINT, Run
from diffusion2gan.distill.steps import (
    discriminator_step,
    frozen,
    micro_batches,
    step,
    step_seed,
    student_step,
)
from diffusion2gan.distill.student import Float32Conv2d, Student
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
    """The pocket pipeline with a much smaller network and random weights."""
    return tiny_pocket.save(tmp_path_factory.mktemp("small_teacher"))


def make_16_pairs(teacher_folder: Path, folder: Path, prompts: list[str]) -> Path:
    teacher = load_teacher(str(teacher_folder))
    spec = PairsSpec(
        teacher.name, teacher.revision, "words", 16, 0, 2, 1.0, teacher.latent_shape, 8
    )
    make_pairs(teacher, lambda indices: [prompts[i % len(prompts)] for i in indices], spec, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = ["a star", "two rings", "a blue heart"]
    return make_16_pairs(teacher_folder, tmp_path_factory.mktemp("pairs"), prompts)


@pytest.fixture(scope="module")
def recipe(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The full method, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("latent_vgg")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = VGG(4, (8, 8, 8, 8, 8), 2)
        heads = [torch.rand(8) for _ in range(5)]
    LatentLPIPS(vgg, heads).save_pretrained(folder)
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


def test_r1_and_its_gradient_are_computed_without_tf32(recipe: Recipe, pairs: Path) -> None:
    """In the forward pass, the first derivative, and the second one that `backward` takes."""
    teacher = load_teacher(recipe.teacher)
    run = Run(recipe, teacher)
    batches = micro_batches(run, next(PairReader(pairs, recipe.seed).batches(BATCH)))
    assert run.discriminator is not None
    allowed: dict[str, list[bool]] = {"forward": [], "backward": []}

    def record_forward(module: nn.Module, args: Any, output: Tensor) -> None:
        allowed["forward"].append(torch.backends.cudnn.allow_tf32)
        if output.requires_grad:
            output.register_hook(record_backward)

    def record_backward(gradient: Tensor) -> None:
        allowed["backward"].append(torch.backends.cudnn.allow_tf32)

    hooks = []
    for module in run.discriminator.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(record_forward))
    steps.r1_step(run, batches, torch.Generator().manual_seed(0))

    # The second derivative goes through the layers once more
    assert len(allowed["forward"]) > 10
    assert len(allowed["backward"]) > len(allowed["forward"])
    assert not any(allowed["forward"]) and not any(allowed["backward"])
    assert torch.backends.cudnn.allow_tf32


@pytest.fixture(scope="module")
def finished_run(recipe: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    distill(recipe, pairs, out)
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    """Checkpoint and log are equal, bit for bit, but for the log's times and memory."""
    tensors, meta = checkpoint.load(found / CHECKPOINT)
    expected_tensors, expected_meta = checkpoint.load(expected / CHECKPOINT)
    assert meta == expected_meta
    assert repeatable_text(found) == repeatable_text(expected)
    assert tensors.keys() == expected_tensors.keys()
    for key, value in expected_tensors.items():
        assert torch.equal(tensors[key], value), key


def start_run(recipe: Recipe, pairs: Path, **changes: Any) -> tuple[Run, Pairs, Distance]:
    """A run after its warm-ups, a batch and the distance.

    The discriminator's weights are perturbed, so that none of its convolutions is zero.
    """
    settings = {"discriminator_warmup": 0, "max_grad_norm": 1e9, "warmup": 0.0, **changes}
    changed = recipe.model_copy(update=settings)
    run = Run(changed, load_teacher(recipe.teacher))
    if run.discriminator is not None:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in run.discriminator.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    batch = next(PairReader(pairs, 0).batches(changed.batch_size))
    return run, batch, build_distance(changed, CPU)


def gradients(module: nn.Module | None) -> list[Tensor]:
    """The gradient of every parameter; zeros for None."""
    assert module is not None
    found = []
    for parameter in module.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(gradient.clone())
    return found


def weights(module: nn.Module | None) -> list[Tensor]:
    assert module is not None
    return [parameter.detach().clone() for parameter in module.parameters()]


def all_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-4
) -> None:
    """‖found − expected‖ / ‖expected‖ over all tensors."""
    a = torch.cat([tensor.flatten().double() for tensor in found])
    b = torch.cat([tensor.flatten().double() for tensor in expected])
    assert float((a - b).norm() / b.norm()) < tolerance


def mean_softplus(logits: list[Tensor], sign: float) -> Tensor:
    """The mean over heads of the mean of softplus(sign·logits)."""
    total = torch.zeros(())
    for head in logits:
        total = total + F.softplus(sign * head).mean()
    return total / len(logits)


# --- The updates ---


def test_student_gradient_is_that_of_the_papers_objective(recipe: Recipe, pairs: Path) -> None:
    """∇(E-LatentLPIPS + λ·softplus(−D)), written out."""
    run, batch, distance = start_run(recipe, pairs)
    assert run.discriminator is not None
    (micro_batch,) = micro_batches(run, batch)
    discriminator_before = weights(run.discriminator)

    # Expected
    latents = run.student(micro_batch.noise, micro_batch.cond)
    generator = torch.Generator().manual_seed(step_seed(recipe.seed, 0))
    logits = run.discriminator(micro_batch.noise, micro_batch.cond, latents)
    loss = distance(latents, batch.latents, generator).mean() + 0.5 * mean_softplus(logits, -1)
    parameters = list(run.student.parameters())
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)

    # Found
    tensors, _ = student_step(run, [micro_batch], distance)
    entry = StepMetrics(tensors).read()
    found = gradients(run.student)
    assert_close(found, [g for g in expected if g is not None], 1e-5)
    assert entry["loss"] + 0.5 * entry["gan_loss"] == pytest.approx(float(loss.detach()))

    # The discriminator was frozen, and is trainable again
    assert all_equal(weights(run.discriminator), discriminator_before)
    for parameter in run.discriminator.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad


def test_discriminator_gradient_is_that_of_the_papers_objective(
    recipe: Recipe, pairs: Path
) -> None:
    """∇(softplus(−D(real)) + softplus(D(fake)) + 3·γ/2·‖∇_x ΣD(real)‖²), without mismatched fakes.

    Real and fake latents are passed separately.
    """
    run, batch, _ = start_run(recipe, pairs, mix_share=0.0, r1_weight=0.1)
    discriminator = run.discriminator
    assert discriminator is not None
    (micro_batch,) = micro_batches(run, batch)
    noise, cond, real = micro_batch.noise, micro_batch.cond, micro_batch.latents
    student_before = weights(run.student)

    # The sample of the R1 penalty, drawn after the numbers that mix_and_match draws
    seed = step_seed(recipe.seed, 0, steps.DISCRIMINATOR)
    generator = torch.Generator().manual_seed(seed)
    torch.rand((), generator=generator)
    torch.randperm(BATCH, generator=generator)
    row = int(torch.randint(BATCH, (), generator=generator))
    sample = slice(row, row + 1)

    # Expected
    with torch.no_grad():
        fake = run.student(noise, cond)
    gan_loss = mean_softplus(discriminator(noise, cond, real), -1)
    gan_loss = gan_loss + mean_softplus(discriminator(noise, cond, fake), 1)
    penalty = r1_penalty(discriminator, noise[sample], cond.rows(sample), real[sample])
    loss = gan_loss + 3 * 0.1 / 2 * penalty
    expected = torch.autograd.grad(loss, list(discriminator.parameters()))

    # Found
    entry = StepMetrics(discriminator_step(run, [micro_batch])).read()
    assert_close(gradients(discriminator), expected, 1e-5)
    assert entry["d_loss"] == pytest.approx(float(gan_loss.detach()), rel=1e-5)
    assert entry["r1"] == pytest.approx(float(penalty.detach()), rel=1e-5)
    assert all_equal(weights(run.student), student_before)


def test_frozen_module_passes_gradients_but_receives_none() -> None:
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True)
    with frozen(layer):
        layer(x).sum().backward()
    assert x.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad

    # Also after an error
    with pytest.raises(KeyboardInterrupt), frozen(layer):
        raise KeyboardInterrupt
    assert all(parameter.requires_grad for parameter in layer.parameters())

    with frozen(None):
        pass


@pytest.mark.parametrize(
    ("gradient_accumulation_steps", "spectral_norm"), [(2, False), (4, False), (4, True)]
)
def test_micro_batches_give_the_same_update(
    recipe: Recipe, pairs: Path, gradient_accumulation_steps: int, spectral_norm: bool
) -> None:
    changed = recipe.model_copy(update={"spectral_norm": spectral_norm})
    full, batch, distance = start_run(changed, pairs)
    divided, _, _ = start_run(
        changed, pairs, gradient_accumulation_steps=gradient_accumulation_steps
    )
    assert full.discriminator is not None and divided.discriminator is not None

    expected_entry = step(full, batch, distance)[0].read()
    entry = step(divided, batch, distance)[0].read()

    assert_close(gradients(divided.discriminator), gradients(full.discriminator))
    assert_close(gradients(divided.student), gradients(full.student))
    for key, value in expected_entry.items():
        assert entry[key] == pytest.approx(value, rel=1e-4), key
    assert entry["accuracy_mixed"] is not None
    assert "r1" in entry

    # Spectral norms took the same number of power iterations
    expected_buffers = dict(full.discriminator.named_buffers())
    buffers = dict(divided.discriminator.named_buffers())
    assert bool(expected_buffers) == spectral_norm
    for key, buffer in expected_buffers.items():
        assert torch.equal(buffers[key], buffer), key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_updates_under_autocast_are_near_those_in_float32(
    recipe: Recipe, pairs: Path, checkpointing: bool
) -> None:
    """As on cuda, but on the CPU; the R1 penalty runs entirely in float32."""
    exact, batch, distance = start_run(recipe, pairs)
    reduced, _, _ = start_run(
        recipe, pairs, precision="bfloat16", gradient_checkpointing=checkpointing
    )
    expected = step(exact, batch, distance)[0].read()
    entry = step(reduced, batch, distance)[0].read()

    assert entry["r1"] == pytest.approx(expected["r1"], rel=1e-4)
    assert entry["d_loss"] != expected["d_loss"]
    for key in ("loss", "gan_loss", "d_loss"):
        assert entry[key] == pytest.approx(expected[key], rel=0.02), key

    assert_close(gradients(reduced.student), gradients(exact.student), 0.1)
    assert_close(gradients(reduced.discriminator), gradients(exact.discriminator), 0.1)
    for parameter in [*weights(reduced.student), *weights(reduced.discriminator)]:
        assert parameter.dtype == torch.float32


def test_real_and_fake_latents_share_one_forward_pass(
    recipe: Recipe, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, batch, _ = start_run(recipe, pairs, r1_weight=0.0)
    assert run.discriminator is not None
    calls: list[tuple[Tensor, Conditioning, Tensor]] = []
    real_forward = run.discriminator.forward

    def forward(*args: Any) -> list[Tensor]:
        calls.append(args)
        return real_forward(*args)

    monkeypatch.setattr(run.discriminator, "forward", forward)
    (micro_batch,) = micro_batches(run, batch)
    discriminator_step(run, [micro_batch])

    ((noise, cond, latents),) = calls
    embeds = micro_batch.cond.prompt_embeds
    assert torch.equal(noise, torch.cat([micro_batch.noise] * 2))
    assert torch.equal(cond.prompt_embeds, torch.cat([embeds] * 2))
    assert torch.equal(latents[:BATCH], micro_batch.latents)

    # 0.4 of 4 fakes are real latents
    num_mixed = 0
    for fake in latents[BATCH:]:
        num_mixed += any(torch.equal(fake, real) for real in micro_batch.latents)
    assert num_mixed in (1, 2)


def test_both_updates_share_the_students_forward_pass(recipe: Recipe, pairs: Path) -> None:
    """The same bits as with a forward pass for each: the student's weights are those before both.

    In two micro-batches the student runs four times.
    """
    shared, batch, distance = start_run(recipe, pairs)
    calls = []
    shared.student.register_forward_hook(lambda *args: calls.append(1))
    entry = step(shared, batch, distance)[0].read()
    assert len(calls) == 1

    separate, _, _ = start_run(recipe, pairs)
    batches = micro_batches(separate, batch)
    tensors = discriminator_step(separate, batches)
    tensors |= student_step(separate, batches, distance)[0]
    assert entry == {"pairs_seen": BATCH, **StepMetrics(tensors).read()}
    assert all_equal(weights(shared.student), weights(separate.student))
    assert all_equal(weights(shared.discriminator), weights(separate.discriminator))

    divided, _, _ = start_run(recipe, pairs, gradient_accumulation_steps=2)
    divided.student.register_forward_hook(lambda *args: calls.append(1))
    step(divided, batch, distance)
    assert len(calls) == 1 + 4


# --- Schedule of the GAN loss ---


def test_student_ignores_the_discriminator_during_its_warm_up(recipe: Recipe, pairs: Path) -> None:
    def train_two_steps(**changes: Any) -> list[Tensor]:
        run, batch, distance = start_run(recipe, pairs, **changes)
        for _ in range(2):
            step(run, batch, distance)
        return weights(run.student)

    without_d = train_two_steps(adversarial_weight=0.0)
    assert all_equal(train_two_steps(discriminator_warmup=2 * BATCH), without_d)
    assert not all_equal(train_two_steps(discriminator_warmup=BATCH), without_d)


def test_discriminator_is_not_trained_before_gan_start_pairs(recipe: Recipe, pairs: Path) -> None:
    run, batch, distance = start_run(
        recipe, pairs, gan_start_pairs=2 * BATCH, discriminator_warmup=BATCH
    )
    without_d, _, _ = start_run(recipe, pairs, adversarial_weight=0.0)
    discriminator_before = weights(run.discriminator)

    # Regression alone
    for _ in range(2):
        entry = step(run, batch, distance)[0].read()
        step(without_d, batch, distance)
        assert "d_loss" not in entry
        assert "gan_loss" not in entry
    assert all_equal(weights(run.discriminator), discriminator_before)
    assert all_equal(weights(run.student), weights(without_d.student))

    # The discriminator's warm-up, then both
    warmup_entry = step(run, batch, distance)[0].read()
    assert "d_loss" in warmup_entry
    assert "gan_loss" not in warmup_entry
    entry = step(run, batch, distance)[0].read()
    assert "gan_loss" in entry


def test_no_discriminator_is_built_without_adversarial_weight(recipe: Recipe, pairs: Path) -> None:
    run, batch, distance = start_run(recipe, pairs, adversarial_weight=0.0)
    assert run.discriminator is None
    assert run.discriminator_optimizer is None

    entry = step(run, batch, distance)[0].read()
    for key in entry:
        assert not key.startswith(("d_", "gan", "accuracy", "logits", "r1"))


def test_run_that_ends_before_the_gan_loss_begins_gets_a_warning(
    recipe: Recipe, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"total_pairs": BATCH, "gan_start_pairs": BATCH, "discriminator_warmup": 0}
    distill(recipe.model_copy(update=changes), pairs, tmp_path)
    output = " ".join(capsys.readouterr().err.split())
    assert "would begin at pair 4 (gan_start_pairs 4" in output


@pytest.mark.slow
def test_discriminator_learns_to_classify_a_fixed_student(recipe: Recipe, pairs: Path) -> None:
    """Also real latents with another pair's prompt."""
    run, batch, distance = start_run(
        recipe,
        pairs,
        learning_rate=1e-9,
        discriminator_learning_rate=3e-3,
        batch_size=8,
        total_pairs=10**6,
        r1_weight=0.0,
    )
    for _ in range(60):
        entry = step(run, batch, distance)[0].read()
    assert entry["accuracy_real"] > 0.9
    assert entry["accuracy_fake"] > 0.9
    assert entry["d_loss"] < 0.7


# --- Log, warnings, failures ---


def test_log_has_the_values_of_both_updates(finished_run: Path) -> None:
    lines = read_log(finished_run)
    with_gan_loss = ["gan_loss" in line for line in lines]
    assert with_gan_loss == [False] * 2 + [True] * (STEPS - 2)  # two steps of warm-up
    with_r1 = [number for number, line in enumerate(lines) if "r1" in line]
    assert with_r1 == list(range(0, STEPS, 3))

    for line in lines:
        assert len(line["logits_real"]) == len(line["logits_fake"]) == 6
        for kind in ("real", "fake", "mixed"):
            assert 0 <= line[f"accuracy_{kind}"] <= 1
        assert line["d_grad_norm"] > 0
        assert line["latent_std_ratio"] > 0
        assert line["skipped"] == 0


def test_warning_is_printed_logged_and_shown_in_the_status(
    recipe: Recipe,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(health, "MIN_VALUES", 2)
    monkeypatch.setitem(health.REMEDIES, health.D_AT_CHANCE, "a remedy")
    monkeypatch.setattr(health, "accuracy", lambda logits, real, rows=None: 0.5)
    changes = {"total_pairs": 4 * BATCH, "discriminator_warmup": 0}
    distill(recipe.model_copy(update=changes), pairs, tmp_path)
    warning = f"{health.D_AT_CHANCE}: a remedy"

    logged = [warning in line.get("warnings", []) for line in read_log(tmp_path)]
    assert logged == [False, True, False, False]

    output = " ".join(capsys.readouterr().err.split())
    assert f"warning: {warning}" in output
    assert f"· {health.D_AT_CHANCE}" in output.split("16/16")[1]
    assert "· ETA 0:00 loss" in output
    assert "D accuracy 50% real 50% fake" in output


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_failure_after_ten_skipped_steps_names_whose_gradient_it_was(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, player: str
) -> None:
    name = f"{player}_loss"
    real = getattr(steps, name)
    monkeypatch.setattr(steps, name, lambda *logits: real(*logits) * float("nan"))
    changes = {"checkpoint_every_s": 1e6, "discriminator_warmup": 0}
    with pytest.raises(
        Failure,
        match=rf"the {player}'s gradient was not finite in 10 .*No checkpoint was written yet",
    ):
        distill(recipe.model_copy(update=changes), pairs, tmp_path)


def test_discriminator_update_that_is_not_finite_is_skipped(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.r1_penalty
    monkeypatch.setattr(steps, "r1_penalty", lambda *args: real(*args) * float("nan"))
    distill(recipe.model_copy(update={"total_pairs": 4 * BATCH}), pairs, tmp_path)

    # R1 is due in the first and in the fourth step
    lines = read_log(tmp_path)
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2]
    assert lines[0]["d_grad_norm"] is None

    tensors, _ = checkpoint.load(tmp_path / CHECKPOINT)
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
    assert float(tensors["discriminator_adam/0/step"]) == 2
    assert float(tensors["adam/0/step"]) == 4


# --- Resuming and refusing ---


def test_adversarial_run_is_a_function_of_its_seed(
    finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path
) -> None:
    distill(recipe, pairs, tmp_path / "again")
    assert_same_run(tmp_path / "again", finished_run)


def test_adversarial_run_killed_between_the_two_updates_resumes_bit_for_bit(
    finished_run: Path, recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.student_step

    def killed(run: Run, *args: Any) -> Any:
        if run.pairs_seen == 10 * BATCH:
            raise KeyboardInterrupt
        return real(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "student_step", killed)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, pairs, tmp_path / "run")

    tensors, meta = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    assert meta["pairs_seen"] == 10 * BATCH
    assert meta["health"]["counts"]["accuracy_real"] == 10
    kinds = {key.split("/")[0] for key in tensors}
    assert kinds == {"student", "adam", "ema", "discriminator", "discriminator_adam"}

    distill(recipe, pairs, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished_run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"discriminator": "patch"},
            "discriminator: 'diffusion' in the run, 'patch' requested",
        ),
        (
            {"multi_scale_output": False},
            "multi_scale_output: True in the run, False requested",
        ),
        (
            {"adversarial_weight": 0.0},
            r"adversarial_weight: 0\.5 in the run, 0\.0 requested",
        ),
    ],
)
def test_run_is_not_resumed_with_another_discriminator(
    finished_run: Path, recipe: Recipe, pairs: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        distill(recipe.model_copy(update=change), pairs, finished_run)


def test_discriminator_needs_pairs_with_prompts_and_a_timestep_of_the_teacher(
    recipe: Recipe, teacher_folder: Path, tmp_path: Path
) -> None:
    folder = make_16_pairs(teacher_folder, tmp_path / "pairs", [""])
    with pytest.raises(
        UserError,
        match=r"have no prompts, and the discriminator reads them.*adversarial_weight=0",
    ):
        distill(recipe, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    # Without a discriminator, or with one that does not read prompts, the same pairs are accepted
    without_d = recipe.model_copy(update={"adversarial_weight": 0.0})
    assert dry_run(without_d, folder)["discriminator_parameters"] == 0
    patch = recipe.model_copy(update={"discriminator": "patch"})
    assert int(dry_run(patch, folder)["discriminator_parameters"]) > 0

    late = recipe.model_copy(update={"discriminator_timestep": 5000})
    with pytest.raises(
        UserError,
        match="discriminator_timestep = 5000 is too large: the teacher's timesteps are 0 to 999",
    ):
        dry_run(late, folder)


def test_some_pairs_without_prompts_give_a_warning(
    recipe: Recipe, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_16_pairs(teacher_folder, tmp_path / "pairs", ["a star", " "])
    dry_run(recipe, folder)
    output = " ".join(capsys.readouterr().err.split())
    assert "warning: 8 of the first 16 pairs in" in output


def test_device_that_does_not_exist_is_refused(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    for name in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match=f"device '{name}' is not available .*; set device=cpu"):
            distill(recipe.model_copy(update={"device": name}), pairs, tmp_path / "run")


@torch.no_grad()
def test_output_layer_stays_in_float32_under_autocast(teacher_folder: Path) -> None:
    """On the CPU, where autocast can be tested on every machine."""
    teacher = load_teacher(str(teacher_folder))
    student = Student(teacher)
    layer = student.network.conv_out
    assert isinstance(layer, Float32Conv2d)

    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode(["a", "b"])
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = teacher.network.conv_out(x).float()
        in_float32 = layer(x)
        latents = student(noise, cond)

    assert not torch.equal(in_float32, in_bfloat16)
    assert torch.equal(in_float32, teacher.network.conv_out(x))
    assert latents.dtype == torch.float32
    student_output = outputs[1]
    assert not torch.equal(student_output, student_output.bfloat16().float())
