"""The conditional discriminator of the transformer families: the teacher's blocks, heads at several depths."""

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
EMBEDDERS = ("x_embedder", "patch_embed", "pos_embed")  # Flux's, Sana's and SD3's: latents → tokens


class TransformerDiscriminator(nn.Module):
    """The teacher's transformer as its own critic: `D(noise, cond, latents)` → a list of logits [B, 1, h, w].

    The weights are copied and all trainable; the text enters by the transformer's own path. The noise enters by a
    patch embedding of its own, added to the latents' tokens and born zero, so that the features are then the
    teacher's. Two heads read each depth: one the tokens' grid, one the same at half the resolution
    (`multi_scale_output`; without it, one head reads the last tokens alone). The tokens have one grid only, so there
    are no lower ones to put latents into. `timestep` is where the network believes to be: 0 is clean.
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
        self.family, self.timestep, self.multi_scale_output = family, timestep, multi_scale_output
        self.network: Any = copy.deepcopy(network).requires_grad_(True).train()
        self.patch = family.packed * network.config.patch_size
        width, answer = network.proj_out.in_features, network.proj_out.out_features
        drop_output(self.network, answer)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        channels = network.config.in_channels // family.packed**2
        self.noise_in = (
            zero_conv(channels, width, self.patch, self.patch, 0) if noise_input else None
        )
        count = 2 * len(depths(self.network)) if multi_scale_output else 1
        self.heads = nn.ModuleList(
            head(width, group_count(width), spectral_norm) for _ in range(count)
        )

    @classmethod
    def from_teacher(
        cls, teacher: Teacher, *, pretrained: bool = True, **options: Any
    ) -> TransformerDiscriminator:
        """From a loaded teacher; without `pretrained`, the same network with random weights (torch's generator)."""
        network = teacher.network
        if not pretrained:
            network = type(network).from_config(network.config).to(teacher.device)
        return cls(network, teacher.family, **options).to(teacher.device)

    def forward(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        features = self.features(noise, cond, latents)
        if self.multi_scale_output:
            read = [scale for x in features for scale in (x, F.avg_pool2d(x, 2, ceil_mode=True))]
        else:
            read = features[-1:]
        return [head(x) for head, x in zip(self.heads, read, strict=True)]

    def features(self, noise: Tensor, cond: Conditioning, latents: Tensor) -> list[Tensor]:
        """[B, D, h, w] on the grid of the tokens, one per depth.

        The last is the input of the teacher's output layers.
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
        noise_in = self.noise_in

        def add(module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
            return tokens + noise_in(noise).flatten(2).mT

        name = next(name for name in EMBEDDERS if hasattr(self.network, name))
        handle = getattr(self.network, name).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def blocks(network: Any) -> list[nn.Module]:
    """In the order in which tokens pass them."""
    return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]


def depths(network: Any) -> list[int]:
    """The last block of each of `NUM_DEPTHS` equal parts; fewer where there are fewer blocks."""
    count = len(blocks(network))
    return sorted({-(-count * part // NUM_DEPTHS) - 1 for part in range(1, NUM_DEPTHS + 1)})


def group_count(channels: int) -> int:
    return 32 if channels % 32 == 0 else 1


def drop_output(network: Any, width: int) -> None:
    """The heads stand in the place of its output layers, which then answer zeros that nobody reads."""
    network.norm_out, network.proj_out = First(), Zeros(width)
    if hasattr(network, "scale_shift_table"):  # Sana's output norm reads it
        network.scale_shift_table = None


class First(nn.Module):
    """The first of whatever it is given."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x


class Zeros(nn.Module):
    """Zeros [..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.width, dtype=x.dtype, device=x.device)
