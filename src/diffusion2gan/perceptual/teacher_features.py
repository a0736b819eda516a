"""LPIPS on the frozen teacher's features, for VAEs that no network has been fitted to.

This is not in the paper. It needs no images, no labels and no human judgements. How well it agrees
with human judgements has not been measured.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.teacher.hooks import capture_outputs
from diffusion2gan.teacher.pipeline import Teacher, copy_sharing_weights

# A transformer's tokens are read after each quarter of its blocks except the last quarter, whose
# features are mostly about the network's output.
NUM_QUARTERS = 4
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


class TeacherFeatures(nn.Module):
    """`features(x [B, C, h, w])` → feature maps of the frozen teacher's network without a prompt.

    For a UNet: the output of each down block, before its downsampling, and of the middle block,
    [B, D, h_l, w_l]. For a transformer: its image tokens after each quarter of its blocks but the
    last, [B, D, tokens, 1].

    The input latents are clean; the timestep is 0, the lowest, at which the network was trained on
    such latents. The weights are the teacher's tensors, not copies; blocks after the last map are
    not run. `bfloat16`: run under autocast.
    """

    def __init__(self, teacher: Teacher, bfloat16: bool = False) -> None:
        super().__init__()
        self.network: Any = copy_sharing_weights(teacher.network)
        self.config = {"in_channels": teacher.latent_shape[0]}
        self.smallest_side = 1
        self.autocast = bfloat16
        if teacher.family.network == "unet":
            self.tapped_blocks = truncate_unet(self.network)
        else:
            self.tapped_blocks = truncate_transformer(self.network)
        self._cond = teacher.unconditional()
        self._output = teacher.family.output

    def forward(self, x: Tensor) -> list[Tensor]:
        """One feature map per tapped block."""
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast)
        with capture_outputs(self.tapped_blocks) as outputs, autocast:
            self._output(self.network, x, 0, self._cond.expand(len(x)))
        return [feature_map(block, outputs[block]) for block in self.tapped_blocks]


def feature_map(block: Any, output: Any) -> Tensor:
    """A block's output as a feature map: [B, D, h, w] of a UNet, [B, D, tokens, 1] otherwise."""
    if not hasattr(block, "resnets"):
        # A transformer block that also handles the text tokens returns the image tokens last.
        tokens = output[-1] if isinstance(output, tuple) else output  # [B, tokens, D]
        return tokens.movedim(1, 2).unsqueeze(-1)
    if isinstance(output, tuple):
        # A UNet's down block returns (hidden states, all intermediate states).
        return output[1][len(block.resnets) - 1]
    # A UNet's middle block.
    return output


def truncate_unet(unet: Any) -> list[nn.Module]:
    """Removes the UNet's decoder; returns the blocks to read: all down blocks and the middle."""
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out = None
    unet.conv_out = nn.Identity()

    blocks = list(unet.down_blocks)
    if unet.mid_block is not None:
        blocks.append(unet.mid_block)
    return blocks


def truncate_transformer(network: Any) -> list[nn.Module]:
    """Removes the blocks of the last quarter; returns the blocks to read.

    These are the last of each of the first three quarters, at least the first block; in a network
    with few blocks some coincide and are read once.
    """
    blocks: list[nn.Module] = []
    for name in BLOCK_LISTS:
        blocks += getattr(network, name, ())

    # Number of blocks before each tap
    depths = set()
    for quarter in range(1, NUM_QUARTERS):
        depths.add(max(1, len(blocks) * quarter // NUM_QUARTERS))
    kept = blocks[: max(depths)]

    for name in BLOCK_LISTS:
        if hasattr(network, name):
            kept_of_list = [block for block in getattr(network, name) if block in kept]
            setattr(network, name, nn.ModuleList(kept_of_list))
    return [blocks[depth - 1] for depth in sorted(depths)]


def plain_distance(teacher: Teacher, **options: Any) -> LatentLPIPS:
    """LatentLPIPS on the teacher's features, with all heads 1/L for L feature maps.

    d(a, b) = mean over maps l of mean_hw Σ_c (f̂_lc(a) − f̂_lc(b))², in [0, 4]. `options` are those
    of `TeacherFeatures`.
    """
    features, heads = build_network(teacher, **options)
    return LatentLPIPS(features, heads)


def ensembled_distance(teacher: Teacher, ensemble: dict[str, Any], **options: Any) -> ELatentLPIPS:
    """E-LatentLPIPS on the teacher's features: `plain_distance` under random transforms.

    `ensemble`: the options of ELatentLPIPS.
    """
    features, heads = build_network(teacher, **options)
    return ELatentLPIPS(features, heads, **ensemble)


@torch.no_grad()
def build_network(teacher: Teacher, **options: Any) -> tuple[VGG, list[Tensor]]:
    """Returns (the teacher's features, one constant head per feature map)."""
    features = TeacherFeatures(teacher, **options)
    maps = features(torch.zeros(1, *teacher.latent_shape, device=teacher.device))
    heads = []
    for feature_map in maps:
        num_channels = feature_map.shape[1]
        heads.append(torch.full((num_channels,), 1 / len(maps), device=feature_map.device))
    # `TeacherFeatures` has everything that a distance uses of a `VGG`.
    return cast(VGG, features), heads
