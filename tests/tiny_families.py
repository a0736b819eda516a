"""A complete tiny pipeline per family: the real classes, a few channels, random weights.

The tokenizers have a vocabulary of a few words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusion2gan.pocket import models

WORDS = (
    "a big blue eight five four green ground of on one red ring seven six small square star stars "
    "three two"
).split()
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = 8  # side of the latents


# Components


def clip(width: int, projection: bool, **options: Any) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer."""
    tokenizer = models.tokenizer()
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
        **options,
    )
    model = CLIPTextModelWithProjection if projection else CLIPTextModel
    return model(config), tokenizer


def t5(width: int) -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [("▁" + word, -1.0) for word in WORDS]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(vocab), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return T5EncoderModel(config), tokenizer


def gemma(width: int) -> tuple[Any, Any]:
    """A Gemma 2 model and its tokenizer."""
    letters = list("abcdefghijklmnopqrstuvwxyz▁")
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *("▁" + word for word in WORDS), *letters]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    config = Gemma2Config(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config), GemmaTokenizer(vocab=vocab, merges=[], model_max_length=300)


def kl(channels: int, **options: Any) -> AutoencoderKL:
    """A VAE with 8 pixels per latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=8 * SIZE,
        **options,
    )


def unet(**options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": SIZE,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **options})


# Pipelines


def sd(scheduler: Any) -> Any:
    """Stable Diffusion 1.x or 2.x."""
    text_encoder, tokenizer = clip(16, projection=False)
    return StableDiffusionPipeline(
        vae=kl(4, scaling_factor=0.18215),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15() -> Any:
    return sd(
        PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    )


def sd21() -> Any:
    return sd(
        DDIMScheduler(
            **SD_BETAS,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    )


def sd21_zero_snr() -> Any:
    return sd(
        DDIMScheduler(
            **SD_BETAS,
            prediction_type="v_prediction",
            clip_sample=False,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            steps_offset=1,
        )
    )


def sdxl() -> Any:
    text_encoder, tokenizer = clip(16, projection=False)
    text_encoder_2, tokenizer_2 = clip(24, projection=True)
    network = unet(
        cross_attention_dim=40,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=kl(4, scaling_factor=0.13025),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=network,
        add_watermarker=False,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def sd3(with_t5: bool = True, **scheduling: Any) -> Any:
    text_encoder, tokenizer = clip(16, projection=True)
    text_encoder_2, tokenizer_2 = clip(24, projection=True)
    text_encoder_3, tokenizer_3 = t5(48) if with_t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduling or {"shift": 3.0}),
        vae=kl(
            16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        text_encoder_3=text_encoder_3,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
    )


def flux(dev: bool = True) -> Any:
    text_encoder, tokenizer = clip(16, projection=False)
    text_encoder_2, tokenizer_2 = t5(32)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        transformer=transformer,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev
        ),
        vae=kl(
            16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )


def sana() -> Any:
    text_encoder, tokenizer = gemma(16)
    widths = (8, 8, 16, 16, 32, 32)
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_block_types="ResBlock",
        decoder_block_out_channels=widths,
        decoder_layers_per_block=(1,) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=SIZE,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        final_sigmas_type="zero",
        beta_schedule="linear",
    )
    return SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


FAMILIES = {
    "sd15": sd15,
    "sd21": sd21,
    "sd21_zero_snr": sd21_zero_snr,
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3_without_t5": lambda: sd3(with_t5=False),
    "sd3_dynamic": lambda: sd3(use_dynamic_shifting=True),
    "flux_dev": flux,
    "flux_schnell": lambda: flux(dev=False),
    "sana": sana,
}
ONE_EACH = ("sd15", "sdxl", "sd3", "flux_dev", "sana")
RESOLUTION = {name: SIZE * (32 if name == "sana" else 8) for name in FAMILIES}  # image side, pixels


def save(name: str, folder: Path) -> Path:
    """Writes a pipeline with random weights of seed 0. Returns `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[name]().save_pretrained(folder, safe_serialization=True)
    return folder
