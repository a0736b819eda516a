"""The only door to diffusers: any supported pipeline folder becomes `encode`, `denoise` and `decode`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.progress import console
from diffusion2gan.teacher import autoencoder
from diffusion2gan.teacher.conditioning import Conditioning as Conditioning
from diffusion2gan.teacher.families import FAMILIES
from diffusion2gan.teacher.prompt_cache import PromptCache
from diffusion2gan.teacher.schedule import Level, Step, to_x0


class Teacher:
    """A frozen text-to-image pipeline. Everything is in eval mode and needs no gradient.

    `resolution` in pixels; the model's own if not given.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str,
        revision: str,
        resolution: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name, self.revision, self.resolution, self.folder = name, revision, resolution, folder
        self.pipeline = pipeline
        self.family = FAMILIES[type(pipeline).__name__]
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self.network: Any = getattr(pipeline, self.family.network)
        self.vae = pipeline.vae
        self.tokenizer = getattr(pipeline, self.family.tokenizer) or pipeline.tokenizer
        self.scheduler: Any = (euler if self.family.flow else ddim)(pipeline.scheduler.config)
        self.prediction_type: str = (
            "flow_prediction" if self.family.flow else self.scheduler.config.prediction_type
        )
        self.truncation_warned = False
        self.device: torch.device = next(self.network.parameters()).device
        self.prompts: PromptCache | None = None

    def cache_prompts(self, prompts: PromptCache) -> None:
        """From now on prompts are looked up there, and the text encoders are gone."""
        self.prompts = prompts
        for name in [name for name in self.pipeline.components if name.startswith("text_encoder")]:
            setattr(self.pipeline, name, None)

    def offload(self, *, network: bool, vae: bool) -> None:
        """Moves what is not needed for now to the CPU; `decode` takes the VAE back while it works."""
        for part in ([self.network] if network else []) + ([self.vae] if vae else []):
            part.to("cpu")

    @property
    def spatial_factor(self) -> int:
        return autoencoder.spatial_factor(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = (
            getattr(self.network.config, "sample_size", None) or self.pipeline.default_sample_size
        )
        if self.resolution is not None:
            size = self.resolution // self.spatial_factor
        height, width = (size, size) if isinstance(size, int) else size
        return (self.network.config.in_channels // self.family.packed**2, height, width)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        _, height, width = self.latent_shape
        return (height * self.spatial_factor, width * self.spatial_factor)

    @property
    def num_tokens(self) -> int:
        """How much of a prompt is read, in its tokenizer's tokens."""
        limit = int(self.tokenizer.model_max_length)
        return limit if self.family.num_tokens is None else min(limit, self.family.num_tokens)

    @property
    def guidance(self) -> Literal["between", "read", "none"]:
        """Classifier-free; a number that the network reads (FLUX.1-dev); or unknown to it (FLUX.1-schnell)."""
        reads = getattr(self.network.config, "guidance_embeds", None)
        if reads is None or self.family.packed == 1:
            return "between"
        return "read" if reads else "none"

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether `guidance_scale` asks for classifier-free guidance. Raises UserError where there can be none."""
        if self.guidance == "none" and guidance_scale > 1:
            raise UserError(
                f"{self.name} was distilled without guidance and cannot use guidance_scale = {guidance_scale}; set "
                "--guidance-scale 0."
            )
        return self.guidance == "between" and guidance_scale > 1

    @property
    def last_timestep(self) -> int:
        """T: the largest training timestep, where the one-step student works."""
        return int(self.scheduler.config.num_train_timesteps) - (0 if self.family.flow else 1)

    def alpha_bar(self, timestep: int) -> float:
        """A diffusion model's ᾱ at `timestep`; a negative one means the end of the ODE."""
        if timestep < 0:
            return float(self.scheduler.final_alpha_cumprod)
        return float(self.scheduler.alphas_cumprod[timestep])

    def level(self, timestep: float) -> Level:
        if self.family.flow:
            return Level.flow(timestep / self.scheduler.config.num_train_timesteps)
        return Level.diffusion(self.alpha_bar(int(timestep)))

    def steps(self, num_inference_steps: int) -> list[Step]:
        """The ODE's steps, in order, at the timesteps of the teacher's own scheduler settings."""
        if self.family.flow:
            return self._flow_steps(num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps)
        stride = self.scheduler.config.num_train_timesteps // num_inference_steps
        timesteps = self.scheduler.timesteps.tolist()
        return [Step(t, self.level(t), self.level(t - stride)) for t in timesteps]

    def _flow_steps(self, num_inference_steps: int) -> list[Step]:
        """Flux spaces σ from 1 to 1/steps, the others as their scheduler does; then each one's own shift."""
        config = self.scheduler.config
        spacing: dict[str, Any] = {}
        if config.use_dynamic_shifting:
            spacing["mu"] = shift_of(config, self.num_image_tokens)
        if self.family.packed > 1 and not config.get("use_flow_sigmas", False):
            spacing["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, **spacing)
        sigmas = self.scheduler.sigmas.tolist()
        levels = pairwise(map(Level.flow, sigmas))
        return [
            Step(t, *both)
            for t, both in zip(self.scheduler.timesteps.tolist(), levels, strict=True)
        ]

    @property
    def num_image_tokens(self) -> int:
        """A transformer's tokens of one picture."""
        _, height, width = self.latent_shape
        patch = self.family.packed * self.network.config.patch_size
        return (height // patch) * (width // patch)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts → what the network reads. Too long ones are cut as diffusers cuts them."""
        if self.prompts is not None:
            return self.prompts.read(prompts).to(self.device)
        if not self.truncation_warned:
            self.truncation_warned = warn_truncated(self.tokenizer, prompts, self.num_tokens)
        return self.family.encode(self.pipeline, prompts, self.pixels).to(self.device)

    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """One row: what the network reads for no prompt, as the stock pipeline guides away from it."""
        return self.family.unconditional(self.pipeline, self.pixels).to(self.device)

    def denoise(
        self, x_t: Tensor, timestep: float, cond: Conditioning, network: nn.Module | None = None
    ) -> Tensor:
        """x0 [B, C, h, w] in float32, by the teacher's network or another of its kind."""
        output = self.family.output(network or self.network, x_t, timestep, cond)
        return to_x0(output, x_t, self.level(timestep), self.prediction_type)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [−1, 1] of latents × scaling_factor."""
        at_rest = self.vae.device
        images = autoencoder.decode(self.vae.to(latents.device), latents).clamp(-1, 1)
        self.vae.to(at_rest)
        return images


def sharing_weights(network: Any) -> Any:
    """A copy of the modules around the very same tensors: what is put into it leaves the original alone."""
    return copy.deepcopy(network, {id(x): x for x in (*network.parameters(), *network.buffers())})


def warn_truncated(tokenizer: Any, prompts: Sequence[str], limit: int | None = None) -> bool:
    """Says how many prompts are cut, if any, at the tokenizer's own limit or `limit`; returns whether it said so."""
    limit = limit or tokenizer.model_max_length
    lengths = [
        len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    ]
    num_long = sum(length > limit for length in lengths)
    if num_long:
        console.print(
            f"warning: {num_long} of {len(prompts)} prompts are longer than the tokenizer's {limit} tokens and are cut "
            "there, as diffusers does (said once).",
            soft_wrap=True,
        )
    return num_long > 0


def ddim(config: Any) -> DDIMScheduler:
    """Deterministic DDIM with a pipeline's own noise schedule and step spacing, never clipping latents."""
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def euler(config: Any) -> FlowMatchEulerDiscreteScheduler:
    """Deterministic Euler with a flow pipeline's own shift, whatever its scheduler calls it."""
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return FlowMatchEulerDiscreteScheduler.from_config(
        config, shift=shift, stochastic_sampling=False
    )


def shift_of(config: Any, num_tokens: int) -> float:
    """µ of a schedule shifted by resolution: linear in the number of image tokens (Esser et al. 2024, 5.3.2)."""
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))
