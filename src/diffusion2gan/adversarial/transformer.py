"""The conditional discriminator of transformer families: the teacher's blocks with added heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.adversarial.heads import head, zero_conv
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.families import Family
from diffusion2gan.teacher.hooks import capture_outputs
from diffusion2gan.teacher.pipeline import Teacher

NUM_DEPTHS = 4  # features are read after each quarter of the blocks
EMBEDDERS = ("x_embedder", "patch_embed", "pos_embed")  # latents → tokens of Flux, Sana and SD3


class TransformerDiscriminator(nn.Module):
    """`D(noise, cond, latents)` → a list of logits [B, 1, h, w], on the teacher's transformer.

    - Weights: a copy of the teacher's, all trainable.
    - Prompt: by the transformer's text inputs.
    - Noise: by a separate patch embedding, added to the latents' tokens. It is initialised to zero,
      so that the features are then the teacher's.
    - Outputs: two heads at each depth, one on the grid of tokens and one at half its resolution;
      without `multi_scale_output`, one head on the last tokens.
    - Latents at lower resolutions, as for a UNet, do not apply: the tokens have a single grid.

    `timestep` is the network's timestep input; the latents are clean, which corresponds to 0.
    """

    def __init__(
        self,
        network: Any,
        family: Family,
        *,
        timestep: int = 0,
        noise_input: bool = True,
        multi_scale_output: bool = True,
        spectral_norm: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.family = family
        self.timestep = timestep
        self.multi_scale_output = multi_scale_output
        self.patch = family.packed * network.config.patch_size  # side of a token, in latents

        # Network
        self.network: Any = copy.deepcopy(network).requires_grad_(True).train()
        width = network.proj_out.in_features
        remove_output_layers(self.network, network.proj_out.out_features)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()

        # Inputs
        self.noise_in: nn.Conv2d | None = None
        if noise_input:
            channels = network.config.in_channels // family.packed**2
            self.noise_in = zero_conv(channels, width, self.patch, self.patch, 0)

        # Heads
        num_heads = 2 * len(depths(self.network)) if multi_scale_output else 1
        groups = num_groups(width)
        self.heads = nn.ModuleList(head(width, groups, spectral_norm) for _ in range(num_heads))

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, *, pretrained: bool = True, **options: Any
    ) -> TransformerDiscriminator:
        """From a loaded teacher; without `pretrained`, its network with random weights.

        The random weights are drawn from torch's global generator.
        """
        network = teacher.network
        if not pretrained:
            network = type(network).from_config(network.config).to(teacher.device)
        return cls(network, teacher.family, **options).to(teacher.device)

    def forward(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        features = self.features(noise, cond, latents)
        if not self.multi_scale_output:
            return [self.heads[0](features[-1])]

        inputs = []
        for x in features:
            inputs.append(x)
            inputs.append(F.avg_pool2d(x, 2, ceil_mode=True))
        return [head(x) for head, x in zip(self.heads, inputs, strict=True)]

    def features(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        """The tokens at each depth, [B, D, h, w] on their grid.

        The last are those that the teacher's output layers would read.
        """
        all_blocks = blocks(self.network)
        read_blocks = [all_blocks[depth] for depth in depths(self.network)]
        with self._add_noise(noise), capture_outputs(read_blocks) as outputs:
            self.family.output(self.network, latents, self.timestep, cond)

        grid = (latents.shape[-2] // self.patch, latents.shape[-1] // self.patch)
        features = []
        for block in read_blocks:
            # A block that also handles the text tokens returns the image tokens last
            output = outputs[block]
            tokens = output[-1] if isinstance(output, tuple) else output  # [B, h·w, D]
            features.append(tokens.unflatten(1, grid).movedim(-1, 1))
        return features

    @contextmanager
    def _add_noise(self, noise: Tensor) -> Iterator[None]:
        """Within the context, the embedded noise is added to the latents' tokens."""
        if self.noise_in is None:
            yield
            return
        noise_tokens = self.noise_in(noise).flatten(2).mT  # [B, h·w, D]

        def add(module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
            return tokens + noise_tokens

        name = next(name for name in EMBEDDERS if hasattr(self.network, name))
        handle = getattr(self.network, name).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def blocks(network: Any) -> list[nn.Module]:
    """The transformer blocks, in the order of evaluation."""
    return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]


def depths(network: Any) -> list[int]:
    """The indices of the blocks that end each quarter (NUM_DEPTHS); fewer for fewer blocks."""
    num_blocks = len(blocks(network))
    indices = set()
    for quarter in range(1, NUM_DEPTHS + 1):
        count = -(-num_blocks * quarter // NUM_DEPTHS)  # rounded up
        indices.add(count - 1)
    return sorted(indices)


def num_groups(channels: int) -> int:
    """Groups of a head's group norm."""
    return 32 if channels % 32 == 0 else 1


def remove_output_layers(network: Any, width: int) -> None:
    """Replaces the output layers, which are not needed with heads; the network returns zeros."""
    network.norm_out = FirstInput()
    network.proj_out = Zeros(width)
    if hasattr(network, "scale_shift_table"):  # part of Sana's output norm
        network.scale_shift_table = None


class FirstInput(nn.Module):
    """Returns its first input."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


class Zeros(nn.Module):
    """Returns zeros [..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.width, dtype=x.dtype, device=x.device)
