"""The UNet discriminator: initially the teacher's features, and what it can learn to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffusion2gan import DiffusionDiscriminator
from diffusion2gan.adversarial.discriminator import (
    Discriminator,
    PatchDiscriminator,
    build_discriminator,
)
from diffusion2gan.adversarial.losses import discriminator_loss, exact_derivatives, r1_penalty
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher

DOWN = "DownBlock2D"
ATTENTION_DOWN = "CrossAttnDownBlock2D"
UP = "UpBlock2D"
ATTENTION_UP = "CrossAttnUpBlock2D"

THREE_RESOLUTIONS: dict[str, Any] = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "down_block_types": (DOWN, ATTENTION_DOWN, ATTENTION_DOWN),
    "up_block_types": (ATTENTION_UP, ATTENTION_UP, UP),
}
SDXL: dict[str, Any] = {
    **THREE_RESOLUTIONS,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 29,
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
}


def make_unet(**options: Any) -> Any:
    """Stable Diffusion's network, very small: two resolutions, random weights, frozen."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "down_block_types": (ATTENTION_DOWN, DOWN),
        "up_block_types": (UP, ATTENTION_UP),
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**settings).eval().requires_grad_(False)


def make_discriminator(unet: Any = None, **options: Any) -> DiffusionDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiffusionDiscriminator(unet or make_unet(), **options)


def make_inputs(
    batch_size: int = 3, size: int = 8, seed: int = 1
) -> tuple[Tensor, Conditioning, Tensor]:
    """(noise, cond, latents), random."""
    generator = torch.Generator().manual_seed(seed)
    noise, latents = torch.randn(2, batch_size, 4, size, size, generator=generator)
    cond = Conditioning(torch.randn(batch_size, 5, 12, generator=generator))
    return noise, cond, latents


def perturb(discriminator: DiffusionDiscriminator) -> DiffusionDiscriminator:
    """As after some training: no weight is zero any more."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return discriminator


def apply_output_layers(unet: Any, features: Tensor) -> Tensor:
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(features)))


# --- Initially, it has the teacher's features ---


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 8), (THREE_RESOLUTIONS, 8), (THREE_RESOLUTIONS, 10), (SDXL, 8)],
)
@pytest.mark.parametrize("timestep", [0, 400])
@torch.no_grad()
def test_initial_features_are_those_of_the_teacher(
    options: dict[str, Any], size: int, timestep: int
) -> None:
    unet = make_unet(**options)
    noise, cond, latents = make_inputs(size=size)
    added_cond = None
    if "addition_embed_type" in options:
        pooled = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
        cond = Conditioning(cond.prompt_embeds, pooled, torch.arange(18.0).reshape(3, 6))
        added_cond = {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}

    expected = unet(latents, timestep, cond.prompt_embeds, added_cond_kwargs=added_cond).sample
    discriminator = make_discriminator(unet, timestep=timestep)
    features = discriminator.features(noise, cond, latents)
    assert torch.equal(apply_output_layers(unet, features[-1].merged), expected)


def test_weights_are_a_trainable_copy_and_all_are_used() -> None:
    unet = make_unet()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    discriminator = make_discriminator(unet)

    # Every parameter gets a gradient
    loss = discriminator_loss(discriminator(*make_inputs()), discriminator(*make_inputs(seed=2)))
    loss.backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name

    # The teacher does not change
    perturb(discriminator)
    for key, value in unet.state_dict().items():
        assert torch.equal(before[key], value), key
    for parameter in unet.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None

    # It has all of the teacher's weights but those of the output layers
    expected = 0
    for key, value in before.items():
        if not key.startswith(("conv_out", "conv_norm_out")):
            expected += value.numel()
    found = 0
    for name, parameter in discriminator.named_parameters():
        if name.startswith(("unet", "upsamplers")):
            found += parameter.numel()
    assert found == expected


def test_three_heads_per_scale_have_its_resolution() -> None:
    discriminator = make_discriminator(make_unet(**THREE_RESOLUTIONS))
    shapes = []
    for scale in discriminator.features(*make_inputs()):
        shapes.append([tuple(features.shape[1:]) for features in scale])
    assert shapes == [
        [(24, 2, 2), (24, 2, 2), (24, 2, 2)],
        [(24, 4, 4), (16, 4, 4), (16, 4, 4)],
        [(16, 8, 8), (8, 8, 8), (8, 8, 8)],
    ]

    logits = discriminator(*make_inputs())
    assert [tuple(head.shape) for head in logits] == [
        (3, 1, size, size) for size in (2, 2, 2, 4, 4, 4, 8, 8, 8)
    ]

    single = make_discriminator(make_unet(**THREE_RESOLUTIONS), multi_scale_output=False)
    assert [tuple(head.shape) for head in single(*make_inputs())] == [(3, 1, 8, 8)]


@torch.no_grad()
def test_scale_is_the_features_before_the_skip_connection_and_after_the_merge() -> None:
    """Compared with the inputs of a decoder block's first layer and upsampler in the teacher."""
    unet = make_unet()
    inputs: list[Tensor] = []
    for layer in (unet.up_blocks[0].resnets[0], unet.up_blocks[0].upsamplers[0]):
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    noise, cond, latents = make_inputs()
    unet(latents, 0, cond.prompt_embeds)
    decoder_input, upsampler_input = inputs

    scale = make_discriminator().features(noise, cond, latents)[0]
    assert torch.equal(torch.cat([scale.before, scale.skip], 1), decoder_input)
    assert torch.equal(scale.merged, upsampler_input)


# --- Inputs ---


@torch.no_grad()
def test_noise_changes_nothing_initially_and_every_head_after_training() -> None:
    discriminator = make_discriminator()
    noise, cond, latents = make_inputs()
    logits = discriminator(noise, cond, latents)
    with_other_noise = discriminator(noise.flip(0) * 9, cond, latents)
    for a, b in zip(logits, with_other_noise, strict=True):
        assert torch.equal(a, b)

    perturb(discriminator)
    logits = discriminator(noise, cond, latents)
    with_other_noise = discriminator(noise.flip(0), cond, latents)
    for a, b in zip(logits, with_other_noise, strict=True):
        assert not torch.allclose(a, b)


def test_discriminator_learns_to_read_the_noise() -> None:
    """Real: latents equal to the noise. Fake: the same latents with another sample's noise."""
    discriminator = make_discriminator()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    for number in range(60):
        noise, cond, _ = make_inputs(batch_size=8, seed=number)
        real = discriminator(noise, cond, noise)
        fake = discriminator(noise.roll(1, 0), cond, noise)
        optimizer.zero_grad()
        discriminator_loss(real, fake).backward()
        optimizer.step()

    noise, cond, _ = make_inputs(batch_size=8, seed=1000)
    without_noise = perturb(make_discriminator(noise_input=False))
    with torch.no_grad():
        real = discriminator(noise, cond, noise)
        fake = discriminator(noise.roll(1, 0), cond, noise)
        assert real[-1].mean() - fake[-1].mean() > 0.5

        # Without the noise input it could not
        real = without_noise(noise, cond, noise)
        fake = without_noise(noise.roll(1, 0), cond, noise)
        assert torch.equal(real[-1], fake[-1])


@torch.no_grad()
def test_logits_depend_on_the_prompt_and_on_their_own_sample_alone() -> None:
    discriminator = perturb(make_discriminator())
    noise, cond, latents = make_inputs()
    logits = discriminator(noise, cond, latents)

    for i in range(3):
        row = slice(i, i + 1)
        single = discriminator(noise[row], cond.rows(row), latents[row])
        for head, single_head in zip(logits, single, strict=True):
            torch.testing.assert_close(head[row], single_head, rtol=1e-4, atol=1e-5)

    other_prompts = Conditioning(cond.prompt_embeds.flip(0))
    with_other_prompts = discriminator(noise, other_prompts, latents)
    for a, b in zip(logits, with_other_prompts, strict=True):
        assert not torch.allclose(a[0], b[0])


@torch.no_grad()
def test_resized_latents_are_added_at_each_lower_resolution() -> None:
    discriminator = make_discriminator()
    without = make_discriminator(multi_scale_input=False)
    noise, cond, latents = make_inputs()
    assert len(discriminator.latents_in) == 1
    assert len(without.latents_in) == 0

    # Initially they change nothing
    initial = discriminator.features(noise, cond, latents)
    for scale, expected in zip(initial, without.features(noise, cond, latents), strict=True):
        for a, b in zip(scale, expected, strict=True):
            assert torch.equal(a, b)

    # A convolution that copies the first channel adds its 2×2 means to the block's input
    block_inputs: list[Tensor] = []
    discriminator.unet.down_blocks[1].register_forward_pre_hook(
        lambda module, args: block_inputs.append(args[0])
    )
    layer: Any = discriminator.latents_in[0]
    layer.weight[:, 0, 1, 1] = 1.0
    changed = discriminator.features(noise, cond, latents)
    layer.weight.zero_()
    discriminator.features(noise, cond, latents)

    with_latents, without_latents = block_inputs
    means = latents[:, :1].unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    expected_difference = means.expand(-1, 8, -1, -1)
    torch.testing.assert_close(
        with_latents - without_latents, expected_difference, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(initial[0].before, changed[0].before)


# --- Options ---


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    noise, cond, latents = make_inputs()

    def compute_gradients(gradient_checkpointing: bool) -> list[Tensor | None]:
        discriminator = perturb(make_discriminator(gradient_checkpointing=gradient_checkpointing))
        with exact_derivatives("cpu"):
            real = discriminator(noise, cond, latents)
            fake = discriminator(noise, cond, noise)
            penalty = r1_penalty(discriminator, noise, cond, latents)
            (discriminator_loss(real, fake) + penalty).backward()
        return [parameter.grad for parameter in discriminator.parameters()]

    for found, expected in zip(compute_gradients(True), compute_gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_spectral_norm_of_every_layer_of_the_heads_is_one() -> None:
    discriminator = make_discriminator(spectral_norm=True).train()
    for _ in range(30):  # power iterations
        discriminator(*make_inputs())

    norms = []
    for layer in discriminator.heads.modules():
        if isinstance(layer, torch.nn.Conv2d):
            norms.append(torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item())
    assert norms == pytest.approx([1.0] * 12, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_unsupported_unet_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message + ".*discriminator=patch"):
        DiffusionDiscriminator(make_unet(**options))


def test_recipe_selects_the_discriminator_and_seeds_its_random_weights(tiny_teacher: Path) -> None:
    teacher = load_teacher(str(tiny_teacher))
    generator = torch.Generator().manual_seed(0)
    noise, latents = torch.randn(2, 2, 4, 16, 16, generator=generator)
    cond = teacher.encode(["a star", "a ring"])

    def build(name: str, seed: int = 0) -> Discriminator:
        settings = {"discriminator": name, "seed": seed, "patch_width": 8}
        return build_discriminator(Recipe.model_validate(settings), teacher)

    global_state = torch.get_rng_state()
    num_heads = []
    for name in ("diffusion", "random", "patch"):
        logits = build(name)(noise, cond, latents)
        num_heads.append(len(logits))
        same_seed = build(name)(noise, cond, latents)
        for a, b in zip(logits, same_seed, strict=True):
            assert torch.equal(a, b)
        other_seed = build(name, seed=1)(noise, cond, latents)
        assert not torch.equal(logits[-1], other_seed[-1])
    assert num_heads == [9, 9, 1]
    assert torch.equal(torch.get_rng_state(), global_state)

    random_weights = build("random").state_dict()["unet.conv_in.weight"]
    assert not torch.equal(random_weights, teacher.network.conv_in.weight)


@torch.no_grad()
def test_patch_discriminator_reads_latents_and_noise() -> None:
    noise, cond, latents = make_inputs()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        discriminator = PatchDiscriminator(4, width=8)
        without_noise = PatchDiscriminator(4, width=8, noise_input=False)

    (logits,) = discriminator(noise, cond, latents)
    (with_other_noise,) = discriminator(noise.flip(0), cond, latents)
    assert logits.shape == (3, 1, 2, 2)
    assert not torch.equal(logits, with_other_noise)

    (logits,) = without_noise(noise, cond, latents)
    (with_other_noise,) = without_noise(noise.flip(0), cond, latents)
    assert torch.equal(logits, with_other_noise)
