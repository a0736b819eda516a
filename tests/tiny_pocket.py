"""The pocket world's pipeline with a UNet that costs next to nothing, all random."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from diffusion2gan.pocket import models


def save(folder: Path) -> Path:
    """Writes it, the same weights each time; `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = models.pipeline()
        pipeline.unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=96,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
