"""The feature networks of the LPIPS distances: VGG-16.

On latents it has batch norm and lacks its first pools; standard LPIPS's, on images, has neither
change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError

# 3×3 convolutions per stage: VGG-16 (Simonyan & Zisserman 2014, table 1, column D).
STAGES = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)


def num_dropped_pools(spatial_factor: int) -> int:
    """How many of VGG's first pools to drop for a VAE with this downsampling factor.

    log2 of the factor: 8 → 3, 4 → 2. Diffusion2GAN drops three for the 8× latents of Stable
    Diffusion, so that stage k has the resolution that it would have on the image's pixels. At most
    four are dropped: the last stage keeps a coarser resolution.
    """
    return min(4, max(0, spatial_factor.bit_length() - 1))


class VGG(nn.Module):
    """`vgg(x [B, in_channels, h, w])` → five feature maps [B, widths[l], h_l, w_l].

    A feature map is the output of a stage's last ReLU, before the stage's pool, as in LPIPS; for
    the stages in `tapped_after_pool` (1 … 5) it is the pool's output. `num_groups`: GroupNorm with
    this many groups; 0 is batch norm; without `has_norm` there is neither. The classifier that such
    a network is trained with belongs to the training code and is not kept.

    `input_shift` and `input_scale`, a number per channel: x is replaced by (x − shift) / scale.
    This cannot be folded into the first convolution, which pads the scaled image with zeros.
    """

    input_shift: Tensor
    input_scale: Tensor

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...] = WIDTHS,
        num_dropped: int = 3,
        tapped_after_pool: tuple[int, ...] = (),
        num_groups: int = 0,
        has_norm: bool = True,
        input_shift: tuple[float, ...] = (),
        input_scale: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        for stage in tapped_after_pool:
            if not num_dropped < stage <= len(STAGES):
                raise UserError(
                    f"tapped_after_pool = {list(tapped_after_pool)}: stage {stage} has no pool; "
                    f"the stages that keep theirs are {num_dropped + 1} … {len(STAGES)}"
                )

        check_input_scaling(in_channels, input_shift, input_scale)

        self.num_dropped = num_dropped
        self.tapped_after_pool = tuple(tapped_after_pool)
        self.scales_input = len(input_scale) > 0
        # The values are settings, in `config`, and not weights.
        for name, values in (("input_shift", input_shift), ("input_scale", input_scale)):
            buffer = torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "widths": list(widths),
            "num_dropped": num_dropped,
            "tapped_after_pool": list(tapped_after_pool),
            "num_groups": num_groups,
        }
        # Written only where they differ, so that the files of other networks stay as they were
        if not has_norm:
            self.config["has_norm"] = False
        if self.scales_input:
            self.config["input_shift"] = list(input_shift)
            self.config["input_scale"] = list(input_scale)

        # Layers
        channels = in_channels
        stages = []
        for num_convolutions, width in zip(STAGES, widths, strict=True):
            layers: list[nn.Module] = []
            for _ in range(num_convolutions):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if has_norm and num_groups > 0:
                    layers.append(nn.GroupNorm(num_groups, width))
                elif has_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)

    @property
    def smallest_side(self) -> int:
        """The smallest input side, in pixels, that the pools before the last map can halve."""
        num_pools = len(STAGES) - 1
        if len(STAGES) in self.tapped_after_pool:
            num_pools = len(STAGES)
        return int(2 ** max(0, num_pools - self.num_dropped))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five feature maps, [B, widths[l], h_l, w_l]."""
        if self.scales_input:
            x = (x - self.input_shift) / self.input_scale

        maps = []
        for number, stage in enumerate(self.stages, 1):
            x = stage(x)
            tapped_after_pool = number in self.tapped_after_pool
            if not tapped_after_pool:
                maps.append(x)
            # The last stage's pool runs only if its output is a feature map.
            if tapped_after_pool or self.num_dropped < number < len(STAGES):
                x = nn.functional.max_pool2d(x, 2)
            if tapped_after_pool:
                maps.append(x)
        return maps


def check_input_scaling(
    in_channels: int, input_shift: tuple[float, ...], input_scale: tuple[float, ...]
) -> None:
    """Raises UserError unless both are empty, or have a number per channel and no zero scale."""
    if len(input_shift) == len(input_scale) == 0:
        return
    if len(input_shift) != in_channels or len(input_scale) != in_channels:
        raise UserError(
            f"input_shift = {list(input_shift)} and input_scale = {list(input_scale)}: the network "
            f"reads {in_channels} channels, and each needs a number for every one"
        )
    values = torch.tensor([input_shift, input_scale])
    if not values.isfinite().all() or 0 in input_scale:
        raise UserError(
            f"input_shift = {list(input_shift)}, input_scale = {list(input_scale)}: finite numbers "
            "are needed, and a scale that is not zero"
        )
