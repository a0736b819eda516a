"""The conditional discriminator D(noise, cond, latents), grown from the teacher's UNet (Kang et al. 2024, section 3.3).

Every discriminator here is one call, `D(noise, cond, latents) → logits`: a list of maps [B, 1, h, w], high where D
holds the latents for the teacher's.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.adversarial.heads import conv, head, zero_conv
from diffusion2gan.adversarial.transformer import TransformerDiscriminator
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.families import added_cond_kwargs
from diffusion2gan.teacher.pipeline import Teacher

DECODER_BLOCKS = {
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "AttnUpBlock2D",
}  # those whose upsampler reads x alone


class Scale(NamedTuple):
    """What the heads read of one decoder scale, all of one grid: before, on and after the merge with the skip."""

    before: Tensor
    skip: Tensor
    merged: Tensor


class DiffusionDiscriminator(nn.Module):
    """The teacher's network as its own critic: `D(noise, cond, latents)` → a list of logits [B, 1, h, w], all float.

    The UNet's weights are copied and all trainable; the text enters by its cross-attention. The noise enters by a
    convolution added to the input's; `multi_scale_input` adds the latents, resized, before each lower down block.
    These convolutions are born zero: the features are then the teacher's, and D does not know the noise. Heads read
    every decoder scale thrice (`Scale`); without `multi_scale_output`, one head reads the last features alone.
    `timestep` is where the network believes to be: the latents are clean, so the smallest is its natural place.

    Raises UserError where the UNet has no cross-attention, or decoder blocks of an unknown kind.
    """

    def __init__(
        self,
        unet: Any,
        *,
        timestep: int = 0,
        noise_input: bool = True,
        multi_scale_input: bool = True,
        multi_scale_output: bool = True,
        spectral_norm: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_unet(unet)
        self.timestep, self.multi_scale_output = timestep, multi_scale_output
        self.unet: Any = copy.deepcopy(unet).float().requires_grad_(True).train()
        self.unet.conv_norm_out = self.unet.conv_out = None  # the heads stand in their place
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.upsamplers = take_upsamplers(self.unet)
        entries, latent_channels = down_channels(self.unet), self.unet.config.in_channels
        self.noise_in = zero_conv(latent_channels, entries[0]) if noise_input else None
        self.latents_in = nn.ModuleList(
            zero_conv(latent_channels, c) for c in entries[1:] if multi_scale_input
        )
        scales = decoder_channels(self.unet)
        read = (
            [channels for scale in scales for channels in scale]
            if multi_scale_output
            else [scales[-1][-1]]
        )
        groups = self.unet.config.norm_num_groups or 1
        self.heads = nn.ModuleList(head(channels, groups, spectral_norm) for channels in read)

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, *, pretrained: bool = True, **options: Any
    ) -> DiffusionDiscriminator:
        """From a loaded teacher; without `pretrained`, the same network with random weights (torch's generator)."""
        unet = teacher.network
        if not pretrained:
            unet = type(unet).from_config(unet.config).to(teacher.device)
        return cls(unet, **options).to(teacher.device)

    def forward(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        scales = self.features(noise, cond, latents)
        read = (
            [x for scale in scales for x in scale]
            if self.multi_scale_output
            else [scales[-1].merged]
        )
        return [head(x) for head, x in zip(self.heads, read, strict=True)]

    def features(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Scale]:
        """The decoder's scales, coarsest first; the last `merged` is what the teacher's output layer would read."""
        unet = self.unet
        emb, text = self._conditions(cond, latents)
        x = unet.conv_in(2 * latents - 1 if unet.config.center_input_sample else latents)
        if self.noise_in is not None:
            x = x + self.noise_in(noise)
        skips = [x]
        for number, block in enumerate(unet.down_blocks):
            if number > 0 and len(self.latents_in) > 0:
                x = x + self.latents_in[number - 1](
                    F.interpolate(latents, size=x.shape[-2:], mode="area")
                )
            x, states = run_block(block, x, emb, text)
            skips += states
        if unet.mid_block is not None:
            x = run_block(unet.mid_block, x, emb, text)
        scales = []
        for block, upsampler in zip(unet.up_blocks, self.upsamplers, strict=True):
            skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            merged = run_block(block, x, emb, text, res_hidden_states_tuple=tuple(own))
            scales.append(Scale(x, own[-1], merged))
            x = upsampler(merged, skips[-1].shape[-2:]) if skips else merged
        return scales

    def _conditions(self, cond: Conditioning, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding [B, E] that every block adds, and the tokens [B, T, D] that its cross-attention reads."""
        unet, more = self.unet, added_cond_kwargs(cond) or {}
        emb = unet.time_embedding(unet.get_time_embed(latents, self.timestep))
        aug_emb = unet.get_aug_embed(emb, cond.prompt_embeds, more)
        emb = emb if aug_emb is None else emb + aug_emb
        emb = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
        return emb, unet.process_encoder_hidden_states(cond.prompt_embeds, more)


class PatchDiscriminator(nn.Module):
    """Convolutions alone, from random weights (Isola et al. 2017, section 3.2.2): the same call, one logits map.

    It reads latents and, unless `noise_input` is off, the noise beside them; it does not read the prompt.
    """

    def __init__(
        self,
        latent_channels: int,
        *,
        width: int = 64,
        noise_input: bool = True,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.noise_input = noise_input
        channels = [latent_channels * (1 + noise_input), width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(channels)):
            layers += [conv(before, after, 3, 1 if i == 0 else 2, spectral_norm), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, conv(channels[-1], 1, 3, 1, spectral_norm))

    @classmethod
    def from_teacher(cls, teacher: Teacher, **options: Any) -> PatchDiscriminator:
        return cls(teacher.latent_shape[0], **options).to(teacher.device)

    def forward(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        return [self.body(torch.cat([latents, noise], 1) if self.noise_input else latents)]


Discriminator = DiffusionDiscriminator | TransformerDiscriminator | PatchDiscriminator


def build_discriminator(recipe: Recipe, teacher: Teacher) -> Discriminator:
    """The recipe's discriminator; what of it is born random is born of the recipe's seed alone."""
    common: dict[str, Any] = {
        "noise_input": recipe.noise_input,
        "spectral_norm": recipe.spectral_norm,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.discriminator == "patch":
            return PatchDiscriminator.from_teacher(teacher, width=recipe.patch_width, **common)
        common |= {
            "pretrained": recipe.discriminator == "diffusion",
            "timestep": recipe.discriminator_timestep,
            "multi_scale_output": recipe.multi_scale_output,
            "gradient_checkpointing": recipe.gradient_checkpointing,
        }
        if teacher.family.network == "transformer":
            return TransformerDiscriminator.from_teacher(teacher, **common)
        return DiffusionDiscriminator.from_teacher(
            teacher, multi_scale_input=recipe.multi_scale_input, **common
        )


def check_unet(unet: Any) -> None:
    """Raises UserError where no discriminator can be grown from this network."""
    blocks = [
        *unet.down_blocks,
        *unet.up_blocks,
        *([unet.mid_block] if unet.mid_block is not None else []),
    ]
    if not any(getattr(block, "has_cross_attention", False) for block in blocks):
        raise UserError(
            "the teacher's UNet has no cross-attention, so a discriminator grown from it could not read the prompt. "
            "Choose a text-to-image teacher, or set discriminator=patch."
        )
    strange = sorted({type(block).__name__ for block in unet.up_blocks} - DECODER_BLOCKS)
    if strange or unet.class_embedding is not None:
        what = f"decoder blocks {', '.join(strange)}" if strange else "a class embedding"
        raise UserError(
            f"the teacher's UNet has {what}; a discriminator grows from {', '.join(sorted(DECODER_BLOCKS))} and text "
            "alone. Choose another teacher, or set discriminator=patch."
        )


def take_upsamplers(unet: Any) -> nn.ModuleList:
    """Moves each decoder block's upsampler out of it, so that the block answers on its own grid."""
    found = [
        block.upsamplers[0] if block.upsamplers is not None else nn.Identity()
        for block in unet.up_blocks
    ]
    for block in unet.up_blocks:
        block.upsamplers = None
    return nn.ModuleList(found)


def run_block(block: Any, x: Tensor, emb: Tensor, text: Tensor, **skips: tuple[Tensor, ...]) -> Any:
    if getattr(block, "has_cross_attention", False):
        return block(x, temb=emb, encoder_hidden_states=text, **skips)
    return block(x, temb=emb, **skips)


def down_channels(unet: Any) -> list[int]:
    """Channels that enter each down block."""
    return [block.resnets[0].in_channels for block in unet.down_blocks]


def decoder_channels(unet: Any) -> list[tuple[int, int, int]]:
    """Channels (before, skip, merged) of each decoder scale, coarsest first."""
    before, channels = unet.down_blocks[-1].resnets[-1].out_channels, []
    for block in unet.up_blocks:
        merged = block.resnets[-1].out_channels
        channels.append((before, block.resnets[0].in_channels - before, merged))
        before = merged
    return channels
