"""Where no network was fitted to a VAE's latents: LPIPS on the frozen teacher's own features. Ours, not the paper's.

It needs no pictures, no labels and no judgements. How well it tells what people see has not been measured.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.teacher.pipeline import Teacher, sharing_weights

NUM_PARTS = (
    4  # a transformer's blocks are read after each quarter but the last, which is about its answer
)
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


class TeacherFeatures(nn.Module):
    """`features(x [B, C, h, w])` → maps of the frozen teacher's network, told no prompt: [B, D, h_l, w_l] or
    [B, D, tokens, 1].

    A UNet's are those of each down block, before it halves its grid, and of the middle; a transformer's its tokens
    after each quarter of its blocks but the last. The latents are clean, the timestep the lowest, 0, where the network
    met such. The weights are the teacher's own tensors; what lies behind the last map is not run. `bfloat16`:
    autocast.
    """

    def __init__(self, teacher: Teacher, bfloat16: bool = False) -> None:
        super().__init__()
        self.network: Any = sharing_weights(teacher.network)
        self.config, self.smallest_side = {"in_channels": teacher.latent_shape[0]}, 1
        self.autocast = bfloat16
        self.read = (
            cut_unet(self.network)
            if teacher.family.network == "unet"
            else cut_transformer(self.network)
        )
        self._cond, self._output = teacher.unconditional(), teacher.family.output

    def forward(self, x: Tensor) -> list[Tensor]:
        seen: dict[int, Tensor] = {}
        with (
            ExitStack() as stack,
            torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast),
        ):
            for number, block in enumerate(self.read):
                stack.callback(block.register_forward_hook(self._keep(number, seen)).remove)
            self._output(self.network, x, 0, self._cond.expand(len(x)))
        return [seen[number] for number in range(len(self.read))]

    def _keep(self, number: int, seen: dict[int, Tensor]) -> Any:
        def hook(block: Any, args: Any, answer: Any) -> None:
            if hasattr(
                block, "resnets"
            ):  # a UNet's down block tells every state, its middle one alone
                seen[number] = (
                    answer[1][len(block.resnets) - 1] if isinstance(answer, tuple) else answer
                )
            else:
                tokens = (
                    answer[-1] if isinstance(answer, tuple) else answer
                )  # behind those of the text
                seen[number] = tokens.movedim(1, 2).unsqueeze(-1)

        return hook


def cut_unet(unet: Any) -> list[nn.Module]:
    """Takes off its decoder; the blocks that are read."""
    unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, nn.Identity()
    return [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else [])]


def cut_transformer(network: Any) -> list[nn.Module]:
    """Takes off what comes after three quarters of its blocks; the blocks that are read."""
    blocks = [block for name in BLOCKS for block in getattr(network, name, ())]
    depths = sorted({max(1, len(blocks) * part // NUM_PARTS) for part in range(1, NUM_PARTS)})
    kept = blocks[: depths[-1]]
    for name in BLOCKS:
        if hasattr(network, name):
            setattr(
                network,
                name,
                nn.ModuleList(block for block in getattr(network, name) if block in kept),
            )
    return [blocks[depth - 1] for depth in depths]


def plain_distance(teacher: Teacher, **options: Any) -> LatentLPIPS:
    """d(a, b) = mean over maps l of mean_hw Σ_c (f̂_lc(a) − f̂_lc(b))²: LPIPS with all heads 1/L. From 0 to 4."""
    return LatentLPIPS(*network_of(teacher, **options))


def ensembled_distance(
    teacher: Teacher, transforms: str, num_draws: int, **options: Any
) -> ELatentLPIPS:
    """The same under E-LatentLPIPS's random transforms, one on both sides."""
    return ELatentLPIPS(*network_of(teacher, **options), transforms=transforms, num_draws=num_draws)


@torch.no_grad()
def network_of(teacher: Teacher, **options: Any) -> tuple[VGG, list[Tensor]]:
    """(the features, a head for each map)."""
    features = TeacherFeatures(teacher, **options)
    maps = features(torch.zeros(1, *teacher.latent_shape, device=teacher.device))
    heads = [torch.full((x.shape[1],), 1 / len(maps), device=x.device) for x in maps]
    return cast(VGG, features), heads  # all that a distance asks of a VGG is there
