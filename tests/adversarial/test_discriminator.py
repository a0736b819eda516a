"""The discriminator at birth is the teacher; what it may read, it learns to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffusion2gan import DiffusionDiscriminator
from diffusion2gan.adversarial.discriminator import PatchDiscriminator, build_discriminator
from diffusion2gan.adversarial.losses import discriminator_loss, plain_attention, r1_penalty
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher

DOWN, ATTENTION_DOWN, UP, ATTENTION_UP = (
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
)


def unet(**options: Any) -> Any:
    """Stable Diffusion's network, very small: two grids, random weights, frozen."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "down_block_types": (ATTENTION_DOWN, DOWN),
        "up_block_types": (UP, ATTENTION_UP),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**settings | options).eval().requires_grad_(False)


THREE_GRIDS = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "down_block_types": (DOWN, ATTENTION_DOWN, ATTENTION_DOWN),
    "up_block_types": (ATTENTION_UP, ATTENTION_UP, UP),
}
SDXL = THREE_GRIDS | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 29,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
}


def inputs(batch: int = 3, size: int = 8, seed: int = 1) -> tuple[Tensor, Conditioning, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise, latents = torch.randn(2, batch, 4, size, size, generator=generator)
    return noise, Conditioning(torch.randn(batch, 5, 12, generator=generator)), latents


def discriminator(network: Any = None, **options: Any) -> DiffusionDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiffusionDiscriminator(network or unet(), **options)


def stirred(made: DiffusionDiscriminator) -> DiffusionDiscriminator:
    """As after some training: nothing is zero any more."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def output(teacher: Any, merged: Tensor) -> Tensor:
    return teacher.conv_out(teacher.conv_act(teacher.conv_norm_out(merged)))


@pytest.mark.parametrize(
    ("options", "size"), [({}, 8), (THREE_GRIDS, 8), (THREE_GRIDS, 10), (SDXL, 8)]
)
@pytest.mark.parametrize("timestep", [0, 400])
def test_its_features_are_born_as_the_teachers(
    options: dict[str, Any], size: int, timestep: int
) -> None:
    teacher = unet(**options)
    noise, cond, latents = inputs(size=size)
    added = None
    if "addition_embed_type" in options:
        cond = Conditioning(cond.prompt_embeds, torch.randn(3, 5), torch.arange(18.0).reshape(3, 6))
        added = {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}
    with torch.no_grad():
        expected = teacher(latents, timestep, cond.prompt_embeds, added_cond_kwargs=added).sample
        features = discriminator(teacher, timestep=timestep).features(noise, cond, latents)
    assert torch.equal(output(teacher, features[-1].merged), expected)


def test_it_is_a_copy_all_of_it_trainable_and_all_of_it_used() -> None:
    teacher = unet()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    made = discriminator(teacher)
    discriminator_loss(made(*inputs()), made(*inputs(seed=2))).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None] == []
    stirred(made)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    kept = {
        key: value
        for key, value in before.items()
        if not key.startswith(("conv_out", "conv_norm_out"))
    }
    numbers = sum(
        p.numel() for name, p in made.named_parameters() if name.startswith(("unet", "upsamplers"))
    )
    assert numbers == sum(value.numel() for value in kept.values())


def test_three_heads_a_scale_on_its_grid() -> None:
    made = discriminator(unet(**THREE_GRIDS))
    scales = made.features(*inputs())
    assert [[tuple(x.shape[1:]) for x in scale] for scale in scales] == [
        [(24, 2, 2), (24, 2, 2), (24, 2, 2)],
        [(24, 4, 4), (16, 4, 4), (16, 4, 4)],
        [(16, 8, 8), (8, 8, 8), (8, 8, 8)],
    ]
    logits = made(*inputs())
    assert [tuple(x.shape) for x in logits] == [(3, 1, s, s) for s in (2, 2, 2, 4, 4, 4, 8, 8, 8)]
    alone = discriminator(unet(**THREE_GRIDS), multi_scale_output=False)(*inputs())
    assert [tuple(x.shape) for x in alone] == [(3, 1, 8, 8)]


def test_the_scales_are_before_on_and_after_the_merge() -> None:
    """Read off the teacher itself, at the inputs of its decoder blocks' first layers and at its upsampler."""
    teacher, seen = unet(), []
    teacher.up_blocks[0].resnets[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    teacher.up_blocks[0].upsamplers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    noise, cond, latents = inputs()
    with torch.no_grad():
        teacher(latents, 0, cond.prompt_embeds)
        first = discriminator(unet()).features(noise, cond, latents)[0]
    assert torch.equal(torch.cat([first.before, first.skip], 1), seen[0]) and torch.equal(
        first.merged, seen[1]
    )


@torch.no_grad()
def test_at_birth_the_noise_changes_nothing_and_later_all() -> None:
    made = discriminator()
    noise, cond, latents = inputs()
    for a, b in zip(
        made(noise, cond, latents), made(noise.flip(0) * 9, cond, latents), strict=True
    ):
        assert torch.equal(a, b)
    stirred(made)
    for a, b in zip(made(noise, cond, latents), made(noise.flip(0), cond, latents), strict=True):
        assert not torch.allclose(a, b)


def test_it_learns_to_read_the_noise() -> None:
    """Real: latents that are the noise; fake: the same latents under each other's noise. Without it, no telling."""
    made, blind = discriminator(), stirred(discriminator(noise_input=False))
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-3)
    for number in range(60):
        noise, cond, _ = inputs(batch=8, seed=number)
        real, fake = made(noise, cond, noise), made(noise.roll(1, 0), cond, noise)
        optimizer.zero_grad()
        discriminator_loss(real, fake).backward()
        optimizer.step()
    noise, cond, _ = inputs(batch=8, seed=1000)
    with torch.no_grad():
        gap = made(noise, cond, noise)[-1].mean() - made(noise.roll(1, 0), cond, noise)[-1].mean()
        assert gap > 0.5
        assert torch.equal(blind(noise, cond, noise)[-1], blind(noise.roll(1, 0), cond, noise)[-1])


@torch.no_grad()
def test_it_reads_the_prompt_and_each_row_alone() -> None:
    made = stirred(discriminator())
    noise, cond, latents = inputs()
    whole = made(noise, cond, latents)
    other = made(noise, Conditioning(cond.prompt_embeds.flip(0)), latents)
    for i in range(3):
        one = slice(i, i + 1)
        alone = made(noise[one], cond.rows(one), latents[one])
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[one], b, rtol=1e-4, atol=1e-5)
    assert not any(torch.allclose(a[0], b[0]) for a, b in zip(whole, other, strict=True))


@torch.no_grad()
def test_latents_enter_each_lower_grid_once_trained() -> None:
    made, without = discriminator(), discriminator(multi_scale_input=False)
    noise, cond, latents = inputs()
    assert len(made.latents_in) == 1 and len(without.latents_in) == 0
    for a, b in zip(
        made.features(noise, cond, latents), without.features(noise, cond, latents), strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    before = made.features(noise, cond, latents)
    layer: Any = made.latents_in[0]
    layer.weight[:, 0, 1, 1] = 1.0  # adds the first channel's 2×2 means, whatever else is there
    seen: list[Tensor] = []
    made.unet.down_blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    after = made.features(noise, cond, latents)
    pooled = latents[:, :1].unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    layer.weight.zero_()
    made.features(noise, cond, latents)
    torch.testing.assert_close(
        seen[0] - seen[1], pooled.expand(-1, 8, -1, -1), rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(before[0].before, after[0].before)


def test_recomputed_activations_give_the_same_gradients() -> None:
    noise, cond, latents = inputs()
    gradients = []
    for recompute in (False, True):
        made = stirred(discriminator(gradient_checkpointing=recompute))
        with plain_attention():
            loss = discriminator_loss(made(noise, cond, latents), made(noise, cond, noise))
            (loss + r1_penalty(made, noise, cond, latents)).backward()
        gradients.append([p.grad for p in made.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_spectral_norm_bounds_the_heads() -> None:
    made = discriminator(spectral_norm=True).train()
    for _ in range(30):
        made(*inputs())
    layers = [m for m in made.heads.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in layers]
    assert len(norms) == 12 and norms == pytest.approx([1.0] * 12, abs=0.05)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"down_block_types": (DOWN, DOWN), "up_block_types": (UP, UP), "mid_block_type": None},
            "no cross-attention",
        ),
        ({"num_class_embeds": 3}, "a class embedding"),
        (
            {"up_block_types": ("ResnetUpsampleBlock2D", ATTENTION_UP)},
            "decoder blocks ResnetUpsampleBlock2D",
        ),
    ],
)
def test_networks_it_cannot_grow_from(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told + ".*discriminator=patch"):
        DiffusionDiscriminator(unet(**options))


def test_the_recipe_chooses_it(tiny_teacher: Path) -> None:
    teacher = load_teacher(str(tiny_teacher))
    noise, latents = torch.randn(2, 2, 4, 16, 16)
    cond = teacher.encode(["a star", "a ring"])
    state = torch.get_rng_state()
    answers = {}
    for name in ("diffusion", "random", "patch"):
        recipe = Recipe(adversarial_weight=1, discriminator=name, patch_width=8)  # type: ignore[arg-type]
        made = build_discriminator(recipe, teacher)
        answers[name] = made(noise, cond, latents)
        again = build_discriminator(recipe, teacher)(noise, cond, latents)
        assert all(torch.equal(a, b) for a, b in zip(answers[name], again, strict=True))
        other = build_discriminator(recipe.model_copy(update={"seed": 1}), teacher)(
            noise, cond, latents
        )
        assert not torch.equal(answers[name][-1], other[-1])
    assert torch.equal(state, torch.get_rng_state())
    assert [len(answers[name]) for name in answers] == [9, 9, 1]
    weights = build_discriminator(Recipe(discriminator="random"), teacher).state_dict()
    assert not torch.equal(weights["unet.conv_in.weight"], teacher.network.conv_in.weight)


def test_the_patch_discriminator_reads_latents_and_noise() -> None:
    noise, cond, latents = inputs()
    made = PatchDiscriminator(4, width=8)
    (logits,) = made(noise, cond, latents)
    assert logits.shape == (3, 1, 2, 2)
    assert not torch.equal(logits, made(noise.flip(0), cond, latents)[0])
    blind = PatchDiscriminator(4, width=8, noise_input=False)
    assert torch.equal(blind(noise, cond, latents)[0], blind(noise.flip(0), cond, latents)[0])
