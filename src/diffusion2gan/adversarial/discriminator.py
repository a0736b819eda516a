"""The conditional discriminator D(noise, cond, latents) (Kang et al. 2024, section 3.3).

It is initialised from the teacher's UNet. Every discriminator in this package has the same call,
`D(noise, cond, latents)` → logits: a list of maps [B, 1, h, w], one per head, high where D takes
the latents for the teacher's.
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
from diffusion2gan.teacher.families import added_cond_kwargs, timestep_tensor
from diffusion2gan.teacher.pipeline import Teacher

# Decoder blocks whose upsampler has no input but the features
DECODER_BLOCKS = {"UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"}


class Scale(NamedTuple):
    """The features that the heads read at one decoder scale, all of the same resolution."""

    before: Tensor  # entering the decoder block
    skip: Tensor  # the skip connection that is merged in first
    merged: Tensor  # after the decoder block


class DiffusionDiscriminator(nn.Module):
    """`D(noise, cond, latents)` → a list of logits [B, 1, h, w], on the teacher's UNet.

    - Weights: a copy of the teacher's, in float32, all trainable.
    - Prompt: by the UNet's cross-attention.
    - Noise: by a convolution added to the input's (`noise_input`).
    - Latents at lower resolutions: resized and convolved, added before each lower down block
      (`multi_scale_input`).
    - Outputs: three heads at every decoder scale (`Scale`); without `multi_scale_output`, one head
      on the last features.

    The added convolutions are initialised to zero: the features are then the teacher's, and do not
    depend on the noise. `timestep` is the UNet's timestep input; the latents are clean, so the
    smallest timestep is the natural choice.

    Raises UserError if the UNet has no cross-attention, or decoder blocks of an unknown kind.
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
        self.timestep = timestep
        self.multi_scale_output = multi_scale_output

        # Network: the teacher's, with heads in place of its output layers
        self.unet: Any = copy.deepcopy(unet).float().requires_grad_(True).train()
        self.unet.conv_norm_out = None
        self.unet.conv_out = None
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.upsamplers = take_upsamplers(self.unet)

        # Inputs
        latent_channels = self.unet.config.in_channels
        first_channels, *lower_channels = down_channels(self.unet)
        self.noise_in = zero_conv(latent_channels, first_channels) if noise_input else None
        self.latents_in = nn.ModuleList()  # one per lower down block
        if multi_scale_input:
            for channels in lower_channels:
                self.latents_in.append(zero_conv(latent_channels, channels))

        # Heads
        groups = self.unet.config.norm_num_groups or 1
        scales = decoder_channels(self.unet)
        self.heads = nn.ModuleList()
        if multi_scale_output:
            for scale in scales:
                for channels in scale:
                    self.heads.append(head(channels, groups, spectral_norm))
        else:
            merged_channels = scales[-1][-1]
            self.heads.append(head(merged_channels, groups, spectral_norm))

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, *, pretrained: bool = True, **options: Any
    ) -> DiffusionDiscriminator:
        """From a loaded teacher; without `pretrained`, its network with random weights.

        The random weights are drawn from torch's global generator.
        """
        unet = teacher.network
        if not pretrained:
            unet = type(unet).from_config(unet.config).to(teacher.device)
        return cls(unet, **options).to(teacher.device)

    def forward(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        scales = self.features(noise, cond, latents)
        if not self.multi_scale_output:
            return [self.heads[0](scales[-1].merged)]

        features = [x for scale in scales for x in scale]
        return [head(x) for head, x in zip(self.heads, features, strict=True)]

    def features(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Scale]:
        """The decoder scales, coarsest first.

        The last `merged` is what the teacher's output layer would read.
        """
        unet = self.unet
        emb, text = self._conditions(cond, latents)

        # Input: latents, plus the noise
        centred = latents
        if unet.config.center_input_sample:
            centred = 2 * latents - 1
        x = unet.conv_in(centred)
        if self.noise_in is not None:
            x = x + self.noise_in(noise)

        # Encoder: at every lower resolution, plus the resized latents
        skips = [x]
        for number, block in enumerate(unet.down_blocks):
            if number > 0 and len(self.latents_in) > 0:
                resized = F.interpolate(latents, size=x.shape[-2:], mode="area")
                x = x + self.latents_in[number - 1](resized)
            x, block_skips = run_block(block, x, emb, text)
            skips += block_skips
        if unet.mid_block is not None:
            x = run_block(unet.mid_block, x, emb, text)

        # Decoder: each block takes as many skips as it has layers, from the end of the list
        scales = []
        for block, upsampler in zip(unet.up_blocks, self.upsamplers, strict=True):
            num_skips = len(block.resnets)
            block_skips = tuple(skips[-num_skips:])
            skips = skips[:-num_skips]
            merged = run_block(block, x, emb, text, res_hidden_states_tuple=block_skips)
            scales.append(Scale(x, block_skips[-1], merged))
            x = merged
            if skips:
                x = upsampler(merged, skips[-1].shape[-2:])
        return scales

    def _conditions(self, cond: Conditioning, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding [B, E] that every block adds, and the tokens [B, T, D] of the prompt."""
        unet = self.unet
        added_cond = added_cond_kwargs(cond) or {}

        timestep = timestep_tensor(self.timestep, latents.device)
        emb = unet.time_embedding(unet.get_time_embed(latents, timestep))
        aug_emb = unet.get_aug_embed(emb, cond.prompt_embeds, added_cond)
        if aug_emb is not None:
            emb = emb + aug_emb
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        return emb, unet.process_encoder_hidden_states(cond.prompt_embeds, added_cond)


class PatchDiscriminator(nn.Module):
    """`D(noise, cond, latents)` → one map of logits: convolutions with random initial weights.

    After Isola et al. 2017, section 3.2.2. It reads the latents and, with `noise_input`, the noise
    beside them; it does not read the prompt.
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
        for number, (in_channels, out_channels) in enumerate(pairwise(channels)):
            stride = 1 if number == 0 else 2
            layers.append(conv(in_channels, out_channels, 3, stride, spectral_norm))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(conv(channels[-1], 1, 3, 1, spectral_norm))
        self.body = nn.Sequential(*layers)

    @classmethod
    def from_teacher(cls, teacher: Teacher, **options: Any) -> PatchDiscriminator:
        return cls(teacher.latent_shape[0], **options).to(teacher.device)

    def forward(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        x = torch.cat([latents, noise], 1) if self.noise_input else latents
        return [self.body(x)]


Discriminator = DiffusionDiscriminator | TransformerDiscriminator | PatchDiscriminator


def build_discriminator(recipe: Recipe, teacher: Teacher) -> Discriminator:
    """The recipe's discriminator; its random weights depend on the recipe's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)

        if recipe.discriminator == "patch":
            return PatchDiscriminator.from_teacher(
                teacher,
                width=recipe.patch_width,
                noise_input=recipe.noise_input,
                spectral_norm=recipe.spectral_norm,
            )

        # Discriminators on the teacher's network
        options: dict[str, Any] = {
            "noise_input": recipe.noise_input,
            "spectral_norm": recipe.spectral_norm,
            "pretrained": recipe.discriminator == "diffusion",
            "timestep": recipe.discriminator_timestep,
            "multi_scale_output": recipe.multi_scale_output,
            "gradient_checkpointing": recipe.gradient_checkpointing,
        }
        if teacher.family.network == "transformer":
            return TransformerDiscriminator.from_teacher(teacher, **options)
        options["multi_scale_input"] = recipe.multi_scale_input
        return DiffusionDiscriminator.from_teacher(teacher, **options)


def check_unet(unet: Any) -> None:
    """Raises UserError if no discriminator can be built from this network."""
    # Text conditioning
    blocks = [*unet.down_blocks, *unet.up_blocks]
    if unet.mid_block is not None:
        blocks.append(unet.mid_block)
    if not any(getattr(block, "has_cross_attention", False) for block in blocks):
        raise UserError(
            "the teacher's UNet has no cross-attention, so a discriminator built from it could not "
            "read the prompt. Choose a text-to-image teacher, or set discriminator=patch."
        )

    # Blocks and further conditioning
    unknown = sorted({type(block).__name__ for block in unet.up_blocks} - DECODER_BLOCKS)
    if unknown:
        unsupported = f"decoder blocks {', '.join(unknown)}"
    elif unet.class_embedding is not None:
        unsupported = "a class embedding"
    else:
        return
    raise UserError(
        f"the teacher's UNet has {unsupported}. A discriminator can be built from UNets with "
        f"decoder blocks {', '.join(sorted(DECODER_BLOCKS))} that are conditioned on text alone. "
        "Choose another teacher, or set discriminator=patch."
    )


def take_upsamplers(unet: Any) -> nn.ModuleList:
    """Moves the upsamplers out of the decoder blocks, whose outputs then have their resolution."""
    upsamplers = nn.ModuleList()
    for block in unet.up_blocks:
        if block.upsamplers is not None:
            upsamplers.append(block.upsamplers[0])
        else:
            upsamplers.append(nn.Identity())
        block.upsamplers = None
    return upsamplers


def run_block(block: Any, x: Tensor, emb: Tensor, text: Tensor, **skips: tuple[Tensor, ...]) -> Any:
    """Runs a block of the UNet; blocks with cross-attention also get the text."""
    if getattr(block, "has_cross_attention", False):
        return block(x, temb=emb, encoder_hidden_states=text, **skips)
    return block(x, temb=emb, **skips)


def down_channels(unet: Any) -> list[int]:
    """The input channels of each down block."""
    return [block.resnets[0].in_channels for block in unet.down_blocks]


def decoder_channels(unet: Any) -> list[tuple[int, int, int]]:
    """The channels (before, skip, merged) of each decoder scale, coarsest first."""
    before = unet.down_blocks[-1].resnets[-1].out_channels
    scales = []
    for block in unet.up_blocks:
        # The first layer's input is `before` and `skip`, concatenated
        skip = block.resnets[0].in_channels - before
        merged = block.resnets[-1].out_channels
        scales.append((before, skip, merged))
        before = merged
    return scales
