"""The feature network of LatentLPIPS: VGG-16 with batch norm, its first pools dropped for latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffusion2gan.errors import UserError

STAGES = (
    2,
    2,
    3,
    3,
    3,
)  # 3×3 convolutions per stage, VGG-16 (Simonyan & Zisserman 2014, table 1, D)
WIDTHS = (64, 128, 256, 512, 512)


def num_dropped_pools(spatial_factor: int) -> int:
    """How many of VGG's first pools to drop for a VAE that is `spatial_factor` times smaller: log2, 8 → 3, 4 → 2.

    Diffusion2GAN drops three for the 8× latents of Stable Diffusion, so that stage k sees the grid it would see on
    the picture's own pixels. At most four are dropped: the last stage keeps a coarser view.
    """
    return min(4, max(0, spatial_factor.bit_length() - 1))


class VGG(nn.Module):
    """`vgg(x [B, in_channels, h, w])` → five feature maps [B, widths[l], h_l, w_l].

    Features are tapped after each stage's last ReLU, before its pool, as LPIPS does; those of the stages in
    `tapped_after_pool` (1 … 5) behind it. `num_groups`: GroupNorm with so many groups; 0 is batch norm. The classifier
    that such a network is trained with is its trainer's matter and is not kept.
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
                    f"no pool to tap stage {stage} behind: the pools left are {num_dropped + 1} … 5"
                )
        self.num_dropped, self.tapped_after_pool = num_dropped, tuple(tapped_after_pool)
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "widths": list(widths),
            "num_dropped": num_dropped,
            "tapped_after_pool": list(tapped_after_pool),
            "num_groups": num_groups,
        }
        channels, stages = in_channels, []
        for count, width in zip(STAGES, widths, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                norm = nn.GroupNorm(num_groups, width) if num_groups else nn.BatchNorm2d(width)
                layers += [nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU()]
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)

    @property
    def smallest_side(self) -> int:
        """Pixels: what the pools before the last tap can still halve."""
        last = len(STAGES) if len(STAGES) in self.tapped_after_pool else len(STAGES) - 1
        return int(2 ** max(0, last - self.num_dropped))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five maps [B, widths[l], h_l, w_l]."""
        maps = []
        for number, stage in enumerate(self.stages, 1):
            x = stage(x)
            behind = number in self.tapped_after_pool
            if not behind:
                maps.append(x)
            if behind or self.num_dropped < number < len(STAGES):
                x = nn.functional.max_pool2d(x, 2)
            if behind:
                maps.append(x)
        return maps
