"""The supported pipeline classes: a row and three small functions for each family.

All that differs between the families is in this module. A family's functions compute the
conditioning of its network (`encode`, `unconditional`) and run the network (`output`), through the
pipeline's own methods wherever it has them. To add a family, add its functions and a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion2gan.teacher.conditioning import Conditioning

ImageSize = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Family:
    """The properties and functions in which one family of pipelines differs from the others.

    - `about`: one line about the models, for the documentation.
    - `network`: the pipeline's attribute with the denoising network.
    - `flow`: a flow model; otherwise a diffusion model.
    - `encode(pipeline, prompts, image_size)`: the conditioning of B prompts.
    - `unconditional(pipeline, image_size, negative_prompt)`: the conditioning without a prompt, or
      that of a negative prompt, one row.
    - `output(network, x_t, timestep, cond)`: the network's output [B, C, h, w].
    - `packed`: side of the latent patch that becomes one input of Flux's network, with all its
      values as channels; 1 for the others.
    - `tokenizer`: the pipeline's attribute with the tokenizer that reads the longest part of a
      prompt, up to `num_tokens` tokens, or to its own limit if that is not given.
    """

    about: str
    network: Literal["unet", "transformer"]
    flow: bool
    encode: Callable[[Any, Sequence[str], ImageSize], Conditioning]
    unconditional: Callable[[Any, ImageSize, str], Conditioning]
    output: Callable[[Any, Tensor, float, Conditioning], Tensor]
    packed: int = 1
    tokenizer: str = "tokenizer"
    num_tokens: int | None = None


# Stable Diffusion 1.x and 2.x


def encode_sd(pipeline: Any, prompts: Sequence[str], image_size: ImageSize) -> Conditioning:
    device = pipeline.text_encoder.device
    return Conditioning(pipeline.encode_prompt(list(prompts), device, 1, False)[0])


def unconditional_sd(
    pipeline: Any, image_size: ImageSize, negative_prompt: str = ""
) -> Conditioning:
    device = pipeline.text_encoder.device
    return Conditioning(pipeline.encode_prompt([""], device, 1, True, [negative_prompt])[1])


def output_unet(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    added = added_cond_kwargs(cond)
    timesteps = timestep_tensor(timestep, x_t.device)
    return torch.as_tensor(
        network(x_t, timesteps, cond.prompt_embeds, added_cond_kwargs=added).sample
    )


def added_cond_kwargs(cond: Conditioning) -> dict[str, Tensor] | None:
    """SDXL's additional network inputs under diffusers' names; None for other models."""
    if cond.pooled_prompt_embeds is None or cond.time_ids is None:
        return None
    return {"text_embeds": cond.pooled_prompt_embeds, "time_ids": cond.time_ids}


# Stable Diffusion XL


def encode_sdxl(pipeline: Any, prompts: Sequence[str], image_size: ImageSize) -> Conditioning:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), device=pipeline.text_encoder.device, do_classifier_free_guidance=False
    )
    sizes = time_ids(pipeline, image_size, embeds).expand(len(embeds), -1)
    return Conditioning(embeds, pooled, sizes)


def unconditional_sdxl(
    pipeline: Any, image_size: ImageSize, negative_prompt: str = ""
) -> Conditioning:
    """Zeros if the pipeline's config requests them (`force_zeros_for_empty_prompt`)."""
    _, embeds, _, pooled = pipeline.encode_prompt(
        [""],
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt or None,
    )
    return Conditioning(embeds, pooled, time_ids(pipeline, image_size, embeds))


def time_ids(pipeline: Any, image_size: ImageSize, embeds: Tensor) -> Tensor:
    """[1, 6]: original size, crop and target size of an uncropped image at its full size.

    Podell et al. 2023, section 2.2; the pipeline's defaults. Dtype and device as `embeds`.
    """
    projection = pipeline.text_encoder_2.config.projection_dim
    sizes = pipeline._get_add_time_ids(image_size, (0, 0), image_size, embeds.dtype, projection)
    return torch.as_tensor(sizes).to(embeds)


# Stable Diffusion 3 and 3.5


def encode_sd3(pipeline: Any, prompts: Sequence[str], image_size: ImageSize) -> Conditioning:
    """The T5 encoder is optional; without it the pipeline uses zeros for its embeddings."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(prompts),
        None,
        None,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
    )
    return Conditioning(embeds, pooled)


def unconditional_sd3(
    pipeline: Any, image_size: ImageSize, negative_prompt: str = ""
) -> Conditioning:
    _, embeds, _, pooled = pipeline.encode_prompt(
        [""],
        None,
        None,
        device=pipeline.text_encoder.device,
        negative_prompt=negative_prompt or None,
    )
    return Conditioning(embeds, pooled)


def output_sd3(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    timesteps = timesteps_like(x_t, timestep)
    output = network(x_t, cond.prompt_embeds, cond.pooled_prompt_embeds, timesteps).sample
    return torch.as_tensor(output)


# FLUX.1


def encode_flux(pipeline: Any, prompts: Sequence[str], image_size: ImageSize) -> Conditioning:
    embeds, pooled, _ = pipeline.encode_prompt(
        list(prompts), None, device=pipeline.text_encoder.device
    )
    return Conditioning(embeds, pooled)


def unconditional_flux(
    pipeline: Any, image_size: ImageSize, negative_prompt: str = ""
) -> Conditioning:
    return encode_flux(pipeline, [negative_prompt], image_size)


def output_flux(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    timesteps = timesteps_like(x_t, timestep / 1000)
    tokens = network(
        pack(x_t),
        cond.prompt_embeds,
        cond.pooled_prompt_embeds,
        timesteps,
        guidance=flux_guidance(network, cond),
        txt_ids=x_t.new_zeros(cond.prompt_embeds.shape[1], 3),
        img_ids=grid_ids(x_t),
    ).sample
    return unpack(tokens, x_t.shape[-2:])


def flux_guidance(network: Any, cond: Conditioning) -> Tensor | None:
    """[B]: the guidance scale for the network, 0 if not set; None for a network without one."""
    if not network.config.guidance_embeds:
        return None
    if cond.guidance is None:
        return cond.prompt_embeds.new_zeros(len(cond))
    return cond.guidance


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] → tokens [B, h/2·w/2, 4C]: 2×2 patches, channels first."""
    patches = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # [B, C, h/2, 2, w/2, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """The reverse of `pack`: tokens [B, h/2·w/2, 4C] → [B, C, h, w], with `size` = (h, w)."""
    height, width = size
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def grid_ids(x: Tensor) -> Tensor:
    """[h/2·w/2, 3]: zero, row and column of each token."""
    height = x.shape[-2] // 2
    width = x.shape[-1] // 2
    row_numbers = torch.arange(height, device=x.device)
    column_numbers = torch.arange(width, device=x.device)
    rows, columns = torch.meshgrid(row_numbers, column_numbers, indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1)
    return ids.flatten(0, 1).to(x)


# Sana


def encode_sana(pipeline: Any, prompts: Sequence[str], image_size: ImageSize) -> Conditioning:
    """With the instruction that the pipeline prepends to a prompt by default.

    Xie et al. 2024, section 2.3.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    instruction = parameters["complex_human_instruction"].default
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        False,
        device=pipeline.text_encoder.device,
        complex_human_instruction=instruction,
    )
    return Conditioning(embeds, prompt_attention_mask=mask.float())


def unconditional_sana(
    pipeline: Any, image_size: ImageSize, negative_prompt: str = ""
) -> Conditioning:
    _, _, embeds, mask = pipeline.encode_prompt(
        [""], True, negative_prompt, device=pipeline.text_encoder.device
    )
    return Conditioning(embeds, prompt_attention_mask=mask.float())


def output_sana(network: Any, x_t: Tensor, timestep: float, cond: Conditioning) -> Tensor:
    timesteps = timesteps_like(x_t, timestep * network.config.timestep_scale)
    output = network(
        x_t, cond.prompt_embeds, timesteps, encoder_attention_mask=cond.prompt_attention_mask
    ).sample
    # Some checkpoints also predict a variance, in further channels
    return torch.as_tensor(output[:, : x_t.shape[1]])


def timestep_tensor(timestep: float, device: torch.device) -> Tensor:
    """A scalar created on the device, in the precision that diffusers' UNets convert numbers to.

    They would copy a number to the device, and the host would wait for it.
    """
    dtype = torch.int64 if isinstance(timestep, int) else torch.float64
    return torch.full((), timestep, dtype=dtype, device=device)


def timesteps_like(x_t: Tensor, timestep: float) -> Tensor:
    """[B] in float32 whatever the precision of `x_t`: bfloat16 would round 999 to 1000."""
    return x_t.new_full((len(x_t),), timestep, dtype=torch.float32)


FAMILIES = {
    "StableDiffusionPipeline": Family(
        about="Stable Diffusion 1.x and 2.x: one CLIP text encoder, a conditional UNet, ε or v",
        network="unet",
        flow=False,
        encode=encode_sd,
        unconditional=unconditional_sd,
        output=output_unet,
    ),
    "StableDiffusionXLPipeline": Family(
        about="Stable Diffusion XL: two CLIP text encoders, pooled text and sizes beside the "
        "prompt",
        network="unet",
        flow=False,
        encode=encode_sdxl,
        unconditional=unconditional_sdxl,
        output=output_unet,
    ),
    "StableDiffusion3Pipeline": Family(
        about="Stable Diffusion 3 and 3.5: a flow transformer, two CLIP text encoders and, "
        "optionally, T5",
        network="transformer",
        flow=True,
        encode=encode_sd3,
        unconditional=unconditional_sd3,
        output=output_sd3,
        tokenizer="tokenizer_3",
        num_tokens=256,
    ),
    "FluxPipeline": Family(
        about="FLUX.1: a flow transformer on packed latents; dev reads the guidance scale, "
        "schnell has none",
        network="transformer",
        flow=True,
        encode=encode_flux,
        unconditional=unconditional_flux,
        output=output_flux,
        packed=2,
        tokenizer="tokenizer_2",
        num_tokens=512,
    ),
    "SanaPipeline": Family(
        about="Sana: a linear flow transformer on the latents of a 32× autoencoder, Gemma as text "
        "encoder",
        network="transformer",
        flow=True,
        encode=encode_sana,
        unconditional=unconditional_sana,
        output=output_sana,
        num_tokens=300,
    ),
}

# Known pipeline classes that cannot be teachers: what they are and what to give instead (used in
# the error message).
REFUSED = {
    "StableDiffusionXLImg2ImgPipeline": (
        "the SDXL refiner, or an image-to-image pipeline, both of which start from an image; give "
        "the base model's text-to-image pipeline"
    ),
    "StableDiffusionInpaintPipeline": (
        "an inpainting pipeline; give a text-to-image StableDiffusionPipeline"
    ),
    "StableDiffusionXLInpaintPipeline": (
        "an inpainting pipeline; give a text-to-image StableDiffusionXLPipeline"
    ),
    "StableDiffusionImg2ImgPipeline": (
        "an image-to-image pipeline; give the same model's StableDiffusionPipeline"
    ),
    "StableDiffusion3Img2ImgPipeline": (
        "an image-to-image pipeline; give the same model's StableDiffusion3Pipeline"
    ),
    "LatentConsistencyModelPipeline": "already distilled; give the model it was distilled from",
    "FluxKontextPipeline": (
        "an editing pipeline, which starts from an image; give a text-to-image FluxPipeline"
    ),
    "FluxFillPipeline": "an inpainting pipeline; give a text-to-image FluxPipeline",
    "SanaSprintPipeline": "already distilled; give the SanaPipeline it was distilled from",
}
