"""The only door to diffusers: any supported pipeline folder becomes `encode`, `denoise` and `decode`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from diffusion2gan.errors import UserError
from diffusion2gan.pocket import shipped
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.progress import console
from diffusion2gan.teacher.families import FAMILIES
from diffusion2gan.teacher.schedule import to_x0

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Conditioning:
    """What the network is told of B prompts: `prompt_embeds` [B, T, D] float32."""

    prompt_embeds: Tensor

    @classmethod
    def concat(cls, *parts: Conditioning) -> Conditioning:
        return cls(torch.cat([part.prompt_embeds for part in parts]))

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def rows(self, rows: slice) -> Conditioning:
        return Conditioning(self.prompt_embeds[rows])


class Teacher:
    """A frozen text-to-image pipeline. Everything is in eval mode and needs no gradient."""

    def __init__(self, pipeline: DiffusionPipeline, name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self.pipeline = pipeline
        self.unet: Any = pipeline.unet.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.eval().requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.scheduler = ddim(pipeline.scheduler.config)
        self.prediction_type: str = self.scheduler.config.prediction_type
        self.truncation_told = False

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def spatial_factor(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    @property
    def last_timestep(self) -> int:
        """T: the largest training timestep, where the one-step student works."""
        return int(self.scheduler.config.num_train_timesteps) - 1

    def alpha_bar(self, timestep: int) -> float:
        """ᾱ at `timestep`; a negative one means the end of the ODE."""
        if timestep < 0:
            return float(self.scheduler.final_alpha_cumprod)
        return float(self.scheduler.alphas_cumprod[timestep])

    def ddim_steps(self, num_inference_steps: int) -> list[tuple[int, float, float]]:
        """(timestep, ᾱ there, ᾱ after the step) of each step, in order."""
        self.scheduler.set_timesteps(num_inference_steps)
        stride = self.scheduler.config.num_train_timesteps // num_inference_steps
        return [(t, self.alpha_bar(t), self.alpha_bar(t - stride)) for t in self.scheduler.timesteps.tolist()]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts → what the UNet's cross-attention reads. Too long ones are cut as diffusers cuts them."""
        limit = self.tokenizer.model_max_length
        if not self.truncation_told:
            self.truncation_told = warn_truncated(self.tokenizer, prompts)
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        return Conditioning(self.text_encoder(ids.to(self.device))[0])

    def denoise(self, x_t: Tensor, timestep: int, cond: Conditioning, unet: nn.Module | None = None) -> Tensor:
        """x0 [B, C, h, w] in float32, by the teacher's network or another `unet` of its kind."""
        output = (unet or self.unet)(x_t, timestep, cond.prompt_embeds).sample
        return to_x0(output, x_t, self.alpha_bar(timestep), self.prediction_type)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [−1, 1] of latents × scaling_factor."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)


def warn_truncated(tokenizer: Any, prompts: Sequence[str]) -> bool:
    """Says how many prompts the tokenizer cuts, if any; returns whether it said so."""
    limit = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids]
    num_long = sum(length > limit for length in lengths)
    if num_long:
        console.print(
            f"warning: {num_long} of {len(prompts)} prompts are longer than the tokenizer's {limit} tokens and are cut "
            "there, as diffusers does (said once).", soft_wrap=True,
        )  # fmt: skip
    return num_long > 0


def ddim(config: Any) -> DDIMScheduler:
    """Deterministic DDIM with a pipeline's own noise schedule and step spacing, never clipping latents."""
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def load_teacher(name: str = "pocket", device: str | torch.device = "cpu") -> Teacher:
    """`pocket` or the folder of a supported diffusers pipeline, in float32.

    Raises UserError where the path is no pipeline folder or its class is not supported.
    """
    folder = shipped.folder("teacher") if name == "pocket" else Path(name)
    check_pipeline_folder(folder)
    pipeline = load_pipeline(folder).to(device)
    _check_family(pipeline, folder)
    return Teacher(pipeline, name if name == "pocket" else folder.name, sha256(folder)[:16])


def check_pipeline_folder(folder: Path) -> str:
    """The class name in `model_index.json`. Raises UserError where there is none or it is not supported."""
    index = folder / "model_index.json"
    if not index.is_file():
        what = "is not a folder" if not folder.is_dir() else "has no model_index.json"
        raise UserError(
            f"{folder} is no diffusers pipeline: it {what}. Give `pocket` or a folder that "
            "`DiffusionPipeline.save_pretrained` wrote."
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{index} does not name a pipeline class ({error}); save the pipeline again.") from error
    if name not in FAMILIES:
        raise UserError(
            f"{folder} is a {name}, which is not supported; supported: {', '.join(FAMILIES)}. Convert it, or choose "
            "another teacher."
        )
    return str(name)


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained` from disk alone: float32, safetensors only, no remote code, no checker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                folder, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False,
                use_safetensors=True, local_files_only=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise UserError(f"the pipeline in {folder} does not load: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_family(pipeline: DiffusionPipeline, folder: Path) -> None:
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{folder} predicts {prediction!r}; supported: epsilon, v_prediction, sample.")
