"""The feature network of LatentLPIPS: VGG-16 with batch norm, its first pools dropped for latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

STAGES = (2, 2, 3, 3, 3)  # 3×3 convolutions per stage, VGG-16 (Simonyan & Zisserman 2014, table 1, D)


def num_dropped_pools(spatial_factor: int) -> int:
    """How many of VGG's first pools to drop for a VAE that is `spatial_factor` times smaller: log2, 8 → 3, 4 → 2.

    Diffusion2GAN drops three for the 8× latents of Stable Diffusion, so that stage k sees the grid it would see on
    the picture's own pixels. At most four are dropped: the last stage keeps a coarser view.
    """
    return min(4, max(0, spatial_factor.bit_length() - 1))


class VGG(nn.Module):
    """`vgg(x [B, in_channels, h, w])` → five feature maps [B, widths[l], h_l, w_l].

    Features are tapped after each stage's last ReLU, before its pool, as LPIPS does. The classifier that such a network
    is trained with is its trainer's matter and is not kept.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...] = (64, 128, 256, 512, 512),
        num_dropped: int = 3,
    ) -> None:
        super().__init__()
        self.num_dropped = num_dropped
        self.config: dict[str, Any] = {
            "in_channels": in_channels, "widths": list(widths), "num_dropped": num_dropped,
        }  # fmt: skip
        channels, stages = in_channels, []
        for count, width in zip(STAGES, widths, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five maps [B, widths[l], h_l, w_l]."""
        maps = []
        for index, stage in enumerate(self.stages):
            if index > self.num_dropped:  # the pool behind stage `index` (counting from 1)
                x = nn.functional.max_pool2d(x, 2)
            x = stage(x)
            maps.append(x)
        return maps
