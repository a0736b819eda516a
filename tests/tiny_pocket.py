"""The pocket pipeline with random weights and a UNet small enough for fast tests."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from diffusion2gan.pocket import models


def save(folder: Path) -> Path:
    """Writes the pipeline, with the same weights each time. Returns `folder`."""
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
