"""The transformer families' discriminator: the same promises as the UNets'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion2gan.adversarial.discriminator import build_discriminator
from diffusion2gan.adversarial.losses import discriminator_loss, plain_attention, r1_penalty
from diffusion2gan.adversarial.transformer import TransformerDiscriminator, blocks, depths
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

NAMES = ("sd3", "flux_dev", "sana")


@pytest.fixture(params=NAMES)
def teacher(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Teacher:
    return load_teacher(
        str(family_folder(request.param)), resolution=256 if request.param == "sana" else 64
    )


def inputs(teacher: Teacher, batch: int = 3) -> tuple[Tensor, Conditioning, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise, latents = torch.randn(2, batch, *teacher.latent_shape, generator=generator)
    return noise, teacher.encode(["a red ring", "two stars", "a big blue square"][:batch]), latents


def made_of(teacher: Teacher, **options: Any) -> TransformerDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TransformerDiscriminator.from_teacher(teacher, **options)


def stirred(made: TransformerDiscriminator, size: float = 0.05) -> TransformerDiscriminator:
    """As after some training: nothing is zero any more."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return made


@torch.no_grad()
def test_its_features_are_born_as_the_teachers(teacher: Teacher) -> None:
    """Read off the teacher's own forward, at the same blocks."""
    noise, cond, latents = inputs(teacher)
    made, expected = made_of(teacher), list[Tensor]()
    for depth in depths(teacher.network):
        blocks(teacher.network)[depth].register_forward_hook(
            lambda module, args, out: expected.append(out[-1] if isinstance(out, tuple) else out)
        )
    teacher.family.output(teacher.network, latents, 0, cond)
    found = made.features(noise, cond, latents)
    assert len(found) == len(expected) == len(blocks(teacher.network))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.flatten(2).mT, theirs)


def test_it_is_a_copy_all_of_it_trainable_and_all_of_it_used(teacher: Teacher) -> None:
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    made = made_of(teacher)
    noise, cond, latents = inputs(teacher)
    discriminator_loss(made(noise, cond, latents), made(noise, cond, noise)).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None] == []
    stirred(made)
    assert all(
        torch.equal(before[key], value) for key, value in teacher.network.state_dict().items()
    )
    assert not any(p.requires_grad or p.grad is not None for p in teacher.network.parameters())


@torch.no_grad()
def test_it_reads_noise_once_trained_prompt_and_each_row_alone(teacher: Teacher) -> None:
    made = made_of(teacher)
    noise, cond, latents = inputs(teacher)
    for a, b in zip(
        made(noise, cond, latents), made(noise.flip(0) * 9, cond, latents), strict=True
    ):
        assert torch.equal(a, b)  # at birth
    stirred(made)
    whole = made(noise, cond, latents)
    other_noise = made(noise.flip(0), cond, latents)
    other_prompt = made(noise, cond.map(lambda x: x.flip(0)), latents)
    blind = stirred(made_of(teacher, noise_input=False))
    for a, b in zip(blind(noise, cond, latents), blind(noise.flip(0), cond, latents), strict=True):
        assert torch.equal(a, b)
    assert not any(torch.allclose(a[0], b[0]) for a, b in zip(whole, other_noise, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(whole, other_prompt, strict=True))
    one = slice(1, 2)
    for a, b in zip(whole, made(noise[one], cond.rows(one), latents[one]), strict=True):
        torch.testing.assert_close(a[one], b, rtol=1e-3, atol=1e-4)


def test_two_heads_a_depth(teacher: Teacher) -> None:
    side = 8 // (teacher.family.packed * teacher.network.config.patch_size)
    shapes = [(3, 1, side, side), (3, 1, side // 2, side // 2)] * len(depths(teacher.network))
    assert [tuple(x.shape) for x in made_of(teacher)(*inputs(teacher))] == shapes
    assert [
        tuple(x.shape) for x in made_of(teacher, multi_scale_output=False)(*inputs(teacher))
    ] == shapes[:1]


def test_r1_is_finite_differences(teacher: Teacher) -> None:
    """Along the gradients themselves: the slope in the latents, and the penalty's in the weights (double backward).

    The networks' own norms and embeddings run in float32, which bounds what differences can tell.
    """
    made = stirred(made_of(teacher), 0.02).double()
    noise, cond, latents = inputs(teacher, 1)
    noise, latents, cond = noise.double(), latents.double(), cond.map(lambda x: x.double())
    x, step = latents.clone().requires_grad_(), 1e-3
    with plain_attention():
        (gradient,) = torch.autograd.grad(sum(logits.sum() for logits in made(noise, cond, x)), x)
    penalty = r1_penalty(made, noise, cond, latents)
    torch.testing.assert_close(penalty.detach(), gradient.square().sum())
    move = step * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (
            sum(float(y.sum()) for y in made(noise, cond, latents + sign * move))
            for sign in (1, -1)
        )
    assert (up - down) / (2 * step) == pytest.approx(float(gradient.norm()), rel=1e-2)
    parameters = list(made.parameters())
    slopes = torch.autograd.grad(penalty, parameters, allow_unused=True)
    length = float(torch.stack([g.square().sum() for g in slopes if g is not None]).sum().sqrt())
    values = []
    for sign in (1, -2):  # to one side, and from there to the other
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter += 0 if slope is None else sign * step * slope / length
        values.append(float(r1_penalty(made, noise, cond, latents).detach()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(length, rel=1e-2)


def test_recomputed_activations_give_the_same_gradients(teacher: Teacher) -> None:
    noise, cond, latents = inputs(teacher, 2)
    gradients = []
    for recompute in (False, True):
        made = stirred(made_of(teacher, gradient_checkpointing=recompute))
        with plain_attention():
            loss = discriminator_loss(made(noise, cond, latents), made(noise, cond, noise))
            (loss + r1_penalty(made, noise, cond, latents)).backward()
        gradients.append([p.grad for p in made.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_recipe_chooses_it(teacher: Teacher) -> None:
    made = build_discriminator(Recipe(adversarial_weight=1), teacher)
    assert isinstance(made, TransformerDiscriminator)
    random = build_discriminator(Recipe(adversarial_weight=1, discriminator="random"), teacher)
    key = next(key for key in made.state_dict() if key.endswith("to_q.weight"))
    assert not torch.equal(made.state_dict()[key], random.state_dict()[key])
