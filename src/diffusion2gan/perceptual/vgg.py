"""The feature network of LatentLPIPS: VGG-16 with batch norm, without its first pools."""

from __future__ import annotations

from typing import Any

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
    this many groups; 0 is batch norm. The classifier that such a network is trained with belongs to
    the training code and is not kept.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...] = WIDTHS,
        num_dropped: int = 3,
        tapped_after_pool: tuple[int, ...] = (),
        num_groups: int = 0,
    ) -> None:
        super().__init__()
        for stage in tapped_after_pool:
            if not num_dropped < stage <= len(STAGES):
                raise UserError(
                    f"tapped_after_pool = {list(tapped_after_pool)}: stage {stage} has no pool; "
                    f"the stages that keep theirs are {num_dropped + 1} … {len(STAGES)}"
                )

        self.num_dropped = num_dropped
        self.tapped_after_pool = tuple(tapped_after_pool)
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "widths": list(widths),
            "num_dropped": num_dropped,
            "tapped_after_pool": list(tapped_after_pool),
            "num_groups": num_groups,
        }

        channels = in_channels
        stages = []
        for num_convolutions, width in zip(STAGES, widths, strict=True):
            layers: list[nn.Module] = []
            for _ in range(num_convolutions):
                norm = nn.GroupNorm(num_groups, width) if num_groups else nn.BatchNorm2d(width)
                layers += [nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU()]
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
