"""The transformer families' discriminator: the same properties as the UNets'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion2gan.adversarial.discriminator import build_discriminator
from diffusion2gan.adversarial.losses import discriminator_loss, exact_derivatives, r1_penalty
from diffusion2gan.adversarial.transformer import TransformerDiscriminator, blocks, depths
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

NAMES = ("sd3", "flux_dev", "sana")
PROMPTS = ["a red ring", "two stars", "a big blue square"]


@pytest.fixture(params=NAMES)
def teacher(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Teacher:
    resolution = 256 if request.param == "sana" else 64
    return load_teacher(str(family_folder(request.param)), resolution=resolution)


def make_inputs(teacher: Teacher, batch_size: int = 3) -> tuple[Tensor, Conditioning, Tensor]:
    """(noise, cond, latents), random."""
    generator = torch.Generator().manual_seed(1)
    noise, latents = torch.randn(2, batch_size, *teacher.latent_shape, generator=generator)
    return noise, teacher.encode(PROMPTS[:batch_size]), latents


def make_discriminator(teacher: Teacher, **options: Any) -> TransformerDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TransformerDiscriminator.from_teacher(teacher, **options)


def perturb(
    discriminator: TransformerDiscriminator, scale: float = 0.05
) -> TransformerDiscriminator:
    """As after some training: no weight is zero any more."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * noise.to(parameter)
    return discriminator


@torch.no_grad()
def test_initial_features_are_those_of_the_teacher(teacher: Teacher) -> None:
    """Compared with the outputs of the same blocks in the teacher's forward pass."""
    noise, cond, latents = make_inputs(teacher)
    discriminator = make_discriminator(teacher)

    expected: list[Tensor] = []

    def store_tokens(module: Any, args: Any, output: Any) -> None:
        expected.append(output[-1] if isinstance(output, tuple) else output)

    teacher_blocks = blocks(teacher.network)
    for depth in depths(teacher.network):
        teacher_blocks[depth].register_forward_hook(store_tokens)
    teacher.family.output(teacher.network, latents, 0, cond)

    features = discriminator.features(noise, cond, latents)
    assert len(features) == len(expected) == len(teacher_blocks)
    for x, tokens in zip(features, expected, strict=True):
        assert torch.equal(x.flatten(2).mT, tokens)


def test_weights_are_a_trainable_copy_and_all_are_used(teacher: Teacher) -> None:
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    discriminator = make_discriminator(teacher)
    noise, cond, latents = make_inputs(teacher)

    # Every parameter gets a gradient
    real = discriminator(noise, cond, latents)
    fake = discriminator(noise, cond, noise)
    discriminator_loss(real, fake).backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name

    # The teacher does not change
    perturb(discriminator)
    for key, value in teacher.network.state_dict().items():
        assert torch.equal(before[key], value), key
    for parameter in teacher.network.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


@torch.no_grad()
def test_logits_depend_on_noise_prompt_and_their_own_sample_alone(teacher: Teacher) -> None:
    discriminator = make_discriminator(teacher)
    noise, cond, latents = make_inputs(teacher)

    # Initially not on the noise
    logits = discriminator(noise, cond, latents)
    with_other_noise = discriminator(noise.flip(0) * 9, cond, latents)
    for a, b in zip(logits, with_other_noise, strict=True):
        assert torch.equal(a, b)

    # After training, on noise and prompt
    perturb(discriminator)
    logits = discriminator(noise, cond, latents)
    with_other_noise = discriminator(noise.flip(0), cond, latents)
    for a, b in zip(logits, with_other_noise, strict=True):
        assert not torch.allclose(a[0], b[0])
    with_other_prompts = discriminator(noise, cond.map(lambda x: x.flip(0)), latents)
    for a, b in zip(logits, with_other_prompts, strict=True):
        assert not torch.equal(a[0], b[0])

    # Never on other samples
    row = slice(1, 2)
    single = discriminator(noise[row], cond.rows(row), latents[row])
    for head, single_head in zip(logits, single, strict=True):
        torch.testing.assert_close(head[row], single_head, rtol=1e-3, atol=1e-4)

    # Without the noise input, never on the noise
    without_noise = perturb(make_discriminator(teacher, noise_input=False))
    logits = without_noise(noise, cond, latents)
    with_other_noise = without_noise(noise.flip(0), cond, latents)
    for a, b in zip(logits, with_other_noise, strict=True):
        assert torch.equal(a, b)


def test_two_heads_per_depth_have_the_tokens_grid_and_half_of_it(teacher: Teacher) -> None:
    side = 8 // (teacher.family.packed * teacher.network.config.patch_size)
    inputs = make_inputs(teacher)

    shapes = [tuple(head.shape) for head in make_discriminator(teacher)(*inputs)]
    shapes_per_depth = [(3, 1, side, side), (3, 1, side // 2, side // 2)]
    assert shapes == shapes_per_depth * len(depths(teacher.network))

    single = make_discriminator(teacher, multi_scale_output=False)(*inputs)
    assert [tuple(head.shape) for head in single] == shapes_per_depth[:1]


def test_r1_and_its_gradient_match_finite_differences(teacher: Teacher) -> None:
    """Along the gradients: the slope of ΣD in the latents, and the slope of R1 in the weights.

    The networks' own norms and embeddings run in float32, which limits the accuracy of differences.
    """
    discriminator = perturb(make_discriminator(teacher), 0.02).double()
    noise, cond, latents = make_inputs(teacher, 1)
    noise = noise.double()
    latents = latents.double()
    cond = cond.map(lambda x: x.double())
    step = 1e-3

    # The penalty is the squared norm of ∇_x ΣD
    x = latents.clone().requires_grad_()
    with exact_derivatives("cpu"):
        total = sum(head.sum() for head in discriminator(noise, cond, x))
        (gradient,) = torch.autograd.grad(total, x)
    penalty = r1_penalty(discriminator, noise, cond, latents)
    torch.testing.assert_close(penalty.detach(), gradient.square().sum())

    # ∇_x ΣD, by finite differences in the latents
    def sum_of_logits(x: Tensor) -> float:
        with torch.no_grad():
            return sum(float(head.sum()) for head in discriminator(noise, cond, x))

    move = step * gradient / gradient.norm()
    slope = (sum_of_logits(latents + move) - sum_of_logits(latents - move)) / (2 * step)
    assert slope == pytest.approx(float(gradient.norm()), rel=1e-2)

    # The gradient of the penalty, by finite differences in the weights
    parameters = list(discriminator.parameters())
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    squares = [g.square().sum() for g in gradients if g is not None]
    norm = float(torch.stack(squares).sum().sqrt())

    def move_weights(distance: float) -> None:
        with torch.no_grad():
            for parameter, parameter_gradient in zip(parameters, gradients, strict=True):
                if parameter_gradient is not None:
                    parameter += distance * parameter_gradient / norm

    move_weights(step)
    upper = float(r1_penalty(discriminator, noise, cond, latents).detach())
    move_weights(-2 * step)
    lower = float(r1_penalty(discriminator, noise, cond, latents).detach())
    assert (upper - lower) / (2 * step) == pytest.approx(norm, rel=1e-2)


def test_gradient_checkpointing_gives_the_same_gradients(teacher: Teacher) -> None:
    noise, cond, latents = make_inputs(teacher, 2)

    def compute_gradients(gradient_checkpointing: bool) -> list[Tensor | None]:
        discriminator = make_discriminator(teacher, gradient_checkpointing=gradient_checkpointing)
        perturb(discriminator)
        with exact_derivatives("cpu"):
            real = discriminator(noise, cond, latents)
            fake = discriminator(noise, cond, noise)
            penalty = r1_penalty(discriminator, noise, cond, latents)
            (discriminator_loss(real, fake) + penalty).backward()
        return [parameter.grad for parameter in discriminator.parameters()]

    for found, expected in zip(compute_gradients(True), compute_gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_recipe_selects_the_transformer_discriminator(teacher: Teacher) -> None:
    pretrained = build_discriminator(Recipe(adversarial_weight=1), teacher)
    assert isinstance(pretrained, TransformerDiscriminator)

    recipe = Recipe(adversarial_weight=1, discriminator="random")
    random_weights = build_discriminator(recipe, teacher).state_dict()
    weights = pretrained.state_dict()
    key = next(key for key in weights if key.endswith("to_q.weight"))
    assert not torch.equal(weights[key], random_weights[key])
