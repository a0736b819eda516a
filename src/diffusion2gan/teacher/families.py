"""The pipeline classes that can teach: one row and a few small functions each. All that differs is here.

A family answers two questions, in the pipeline's own words wherever it has them: what is its network told of a prompt
(`encode`, `unconditional`), and what does the network say (`output`). Adding one is adding these and a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion2gan.teacher.conditioning import Conditioning

Pixels = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Family:
    """`encode(pipeline, prompts, pixels)`, `unconditional(pipeline, pixels)` of one row, `output(network, x, t, cond)`.

    `network` is the pipeline's attribute; `packed` is how many times Flux's network sees a latent grid smaller, its
    channels multiplied; `tokenizer` reads the most of a prompt, up to `num_tokens` where that is not its own limit.
    """

    about: str
    network: Literal["unet", "transformer"]
    flow: bool
    encode: Callable[[Any, Sequence[str], Pixels], Conditioning]
    unconditional: Callable[[Any, Pixels], Conditioning]
    output: Callable[[Any, Tensor, float, Conditioning], Tensor]
    packed: int = 1
    tokenizer: str = "tokenizer"
    num_tokens: int | None = None


def encode_sd(pipeline: Any, prompts: Sequence[str], pixels: Pixels) -> Conditioning:
    return Conditioning(
        pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)[0]
    )


def unconditional_sd(pipeline: Any, pixels: Pixels) -> Conditioning:
    return Conditioning(pipeline.encode_prompt([""], pipeline.text_encoder.device, 1, True)[1])


def output_unet(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    return torch.as_tensor(
        network(x_t, timestep, cond.prompt_embeds, added_cond_kwargs=added(cond)).sample
    )


def added(cond: Conditioning) -> dict[str, Tensor] | None:
    """SDXL's own names of what its network reads beside the prompt; None for the others."""
    if cond.pooled_prompt_embeds is None or cond.time_ids is None:
        return None
    return {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}


def encode_sdxl(pipeline: Any, prompts: Sequence[str], pixels: Pixels) -> Conditioning:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), device=pipeline.text_encoder.device, do_classifier_free_guidance=False
    )
    return Conditioning(embeds, pooled, time_ids(pipeline, pixels, embeds).expand(len(embeds), -1))


def unconditional_sdxl(pipeline: Any, pixels: Pixels) -> Conditioning:
    """Zeros where the pipeline's config asks for them (`force_zeros_for_empty_prompt`)."""
    _, embeds, _, pooled = pipeline.encode_prompt(
        [""], device=pipeline.text_encoder.device, do_classifier_free_guidance=True
    )
    return Conditioning(embeds, pooled, time_ids(pipeline, pixels, embeds))


def time_ids(pipeline: Any, pixels: Pixels, embeds: Tensor) -> Tensor:
    """[1, 6]: a picture of its full size, uncropped (Podell et al. 2023, section 2.2), as the pipeline's defaults."""
    projection = pipeline.text_encoder_2.config.projection_dim
    return torch.as_tensor(
        pipeline._get_add_time_ids(pixels, (0, 0), pixels, embeds.dtype, projection)
    ).to(embeds)


def encode_sd3(pipeline: Any, prompts: Sequence[str], pixels: Pixels) -> Conditioning:
    """The T5 encoder is optional: without it the pipeline puts zeros in its place."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(prompts),
        None,
        None,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
    )
    return Conditioning(embeds, pooled)


def unconditional_sd3(pipeline: Any, pixels: Pixels) -> Conditioning:
    _, embeds, _, pooled = pipeline.encode_prompt(
        [""], None, None, device=pipeline.text_encoder.device
    )
    return Conditioning(embeds, pooled)


def output_sd3(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    told = x_t.new_full((len(x_t),), timestep)
    return torch.as_tensor(network(x_t, cond.prompt_embeds, cond.pooled_prompt_embeds, told).sample)


def encode_flux(pipeline: Any, prompts: Sequence[str], pixels: Pixels) -> Conditioning:
    embeds, pooled, _ = pipeline.encode_prompt(
        list(prompts), None, device=pipeline.text_encoder.device
    )
    return Conditioning(embeds, pooled)


def unconditional_flux(pipeline: Any, pixels: Pixels) -> Conditioning:
    return encode_flux(pipeline, [""], pixels)


def output_flux(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    told = x_t.new_full((len(x_t),), timestep / 1000)
    tokens = network(
        pack(x_t),
        cond.prompt_embeds,
        cond.pooled_prompt_embeds,
        told,
        guidance=flux_guidance(network, cond),
        txt_ids=x_t.new_zeros(cond.prompt_embeds.shape[1], 3),
        img_ids=grid_ids(x_t),
    ).sample
    return unpack(tokens, x_t.shape[-2:])


def flux_guidance(network: Any, cond: Conditioning) -> Tensor | None:
    """[B] the guidance scale that the network reads, 0 if it was told none; None where it reads none."""
    if not network.config.guidance_embeds:
        return None
    return cond.prompt_embeds.new_zeros(len(cond)) if cond.guidance is None else cond.guidance


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] → tokens [B, h/2·w/2, 4C]: 2×2 patches, channels first."""
    return (
        x.unflatten(2, (-1, 2))
        .unflatten(4, (-1, 2))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(3)
        .flatten(1, 2)
    )


def unpack(tokens: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """The reverse of `pack`."""
    height, width = size
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def grid_ids(x: Tensor) -> Tensor:
    """[h/2·w/2, 3]: nothing, row and column of each token."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x)


def encode_sana(pipeline: Any, prompts: Sequence[str], pixels: Pixels) -> Conditioning:
    """With the instruction that the pipeline puts before a prompt by default (Xie et al. 2024, section 2.3)."""
    instruction = (
        inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    )
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        False,
        device=pipeline.text_encoder.device,
        complex_human_instruction=instruction,
    )
    return Conditioning(embeds, prompt_attention_mask=mask.float())


def unconditional_sana(pipeline: Any, pixels: Pixels) -> Conditioning:
    _, _, embeds, mask = pipeline.encode_prompt([""], True, device=pipeline.text_encoder.device)
    return Conditioning(embeds, prompt_attention_mask=mask.float())


def output_sana(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    told = x_t.new_full((len(x_t),), timestep * network.config.timestep_scale)
    answer = network(
        x_t, cond.prompt_embeds, told, encoder_attention_mask=cond.prompt_attention_mask
    ).sample
    return torch.as_tensor(answer[:, : x_t.shape[1]])  # some checkpoints answer a variance too


FAMILIES = {
    "StableDiffusionPipeline": Family(
        "Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional UNet, ε or v",
        "unet",
        False,
        encode_sd,
        unconditional_sd,
        output_unet,
    ),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL: two CLIP text encoders, pooled text and sizes beside the prompt",
        "unet",
        False,
        encode_sdxl,
        unconditional_sdxl,
        output_unet,
    ),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3 and 3.5: a flow transformer, two CLIP text encoders and, optionally, T5",
        "transformer",
        True,
        encode_sd3,
        unconditional_sd3,
        output_sd3,
        tokenizer="tokenizer_3",
        num_tokens=256,
    ),
    "FluxPipeline": Family(
        "FLUX.1: a flow transformer on packed latents; dev reads the guidance scale, schnell has none",
        "transformer",
        True,
        encode_flux,
        unconditional_flux,
        output_flux,
        2,
        "tokenizer_2",
        512,
    ),
    "SanaPipeline": Family(
        "Sana: a linear flow transformer on the latents of a 32× autoencoder, Gemma as text encoder",
        "transformer",
        True,
        encode_sana,
        unconditional_sana,
        output_sana,
        num_tokens=300,
    ),
}

# What these are, and what to give instead: for the error that refuses them.
REFUSED = {
    "StableDiffusionXLImg2ImgPipeline": "the SDXL refiner, or an image-to-image pipeline, both of which start from a "
    "picture; give the base model's text-to-image pipeline",
    "StableDiffusionInpaintPipeline": "an inpainting pipeline; give a text-to-image StableDiffusionPipeline",
    "StableDiffusionXLInpaintPipeline": "an inpainting pipeline; give a text-to-image StableDiffusionXLPipeline",
    "StableDiffusionImg2ImgPipeline": "an image-to-image pipeline; give the same model's StableDiffusionPipeline",
    "StableDiffusion3Img2ImgPipeline": "an image-to-image pipeline; give the same model's StableDiffusion3Pipeline",
    "LatentConsistencyModelPipeline": "already distilled; give the model it was distilled from",
    "FluxKontextPipeline": "an editing pipeline, which starts from a picture; give a text-to-image FluxPipeline",
    "FluxFillPipeline": "an inpainting pipeline; give a text-to-image FluxPipeline",
    "SanaSprintPipeline": "already distilled; give the SanaPipeline it was distilled from",
}
