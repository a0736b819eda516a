"""Complete pipelines with random weights at the pocket's, Stable Diffusion 1.5's and XL's sizes.

Speed and memory do not depend on training. The text encoders have their real widths and depths;
their tokenizer is the pocket's, with a small vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion2gan.pocket import models
from diffusion2gan.teacher.pipeline import Teacher

SIZES = ("pocket", "sd15", "sdxl")
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
CROSS_DOWN = "CrossAttnDownBlock2D"
CROSS_UP = "CrossAttnUpBlock2D"


def text_encoder(model_class: Any, width: int, num_layers: int, num_heads: int) -> Any:
    vocab_size = len(models.tokenizer())
    return model_class(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=77,
            projection_dim=width,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def tokenizer() -> Any:
    tokenizer = models.tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=(CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        up_block_types=("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    )


def sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE, sample_size=512, scaling_factor=0.18215),
        tokenizer=tokenizer(),
        text_encoder=text_encoder(CLIPTextModel, 768, 12, 12),
        unet=sd15_unet(),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D"),
    )


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        text_encoder=text_encoder(CLIPTextModel, 768, 12, 12),
        unet=sdxl_unet(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 1280, 32, 20),
        scheduler=DDIMScheduler(**SCHEDULE),
        add_watermarker=False,
    )


def random_pipeline(size: str, device: str) -> Any:
    """Created on its device: a CPU takes minutes to fill billions of random numbers."""
    build = {"pocket": models.pipeline, "sd15": sd15, "sdxl": sdxl}[size]
    torch.manual_seed(0)
    with torch.device(device):
        pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def random_teacher(size: str, device: str) -> Teacher:
    return Teacher(random_pipeline(size, device), size, "random")
