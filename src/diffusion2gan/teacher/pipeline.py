"""The teacher: a frozen diffusers pipeline with `encode`, `denoise` and `decode`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.progress import console
from diffusion2gan.runtime.transfer import AsynchronousCopies, to_device
from diffusion2gan.teacher import autoencoder
from diffusion2gan.teacher.conditioning import Conditioning as Conditioning
from diffusion2gan.teacher.families import FAMILIES
from diffusion2gan.teacher.pipeline_info import PipelineInfo
from diffusion2gan.teacher.prompt_cache import PromptCache
from diffusion2gan.teacher.schedule import Level, Step, karras_steps, to_x0


class Teacher:
    """A text-to-image pipeline in eval mode, without gradients.

    `name` and `revision` identify it in pair sets and runs. `resolution` is the side of its images
    in pixels, the model's default if not given. `folder` is the folder or file it was read from,
    `config_folder` the folder with its model_index.json. `sources` are the components whose files
    a stock pipeline reads as the teacher does, with their folders: those that are neither changed
    in memory nor in a layout of their own.

    Of a pipeline's sizes and limits it has `latent_shape` (C, h, w), `image_size` (height and width
    in pixels), `spatial_factor` (pixels per latent), `tokenizer` and `num_tokens`; see
    `PipelineInfo`.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str,
        revision: str,
        resolution: int | None = None,
        folder: Path | None = None,
        config_folder: Path | None = None,
        sources: Mapping[str, Path] | None = None,
    ) -> None:
        self.name = name
        self.revision = revision
        self.resolution = resolution
        self.folder = folder
        self.config_folder = config_folder
        self.sources = dict(sources or {})

        # Components
        self.pipeline = pipeline
        self.family = FAMILIES[type(pipeline).__name__]
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        self.network: Any = getattr(pipeline, self.family.network)
        self.vae = pipeline.vae
        self.device: torch.device = next(self.network.parameters()).device
        self.precision = "float32"

        # Noise schedule
        if self.family.flow:
            self.scheduler: Any = euler_scheduler(pipeline.scheduler.config)
            self.prediction_type: str = "flow_prediction"
        else:
            self.scheduler = ddim_scheduler(pipeline.scheduler.config)
            self.prediction_type = self.scheduler.config.prediction_type

        # Sizes and limits
        self.spatial_factor = autoencoder.spatial_factor(self.vae)
        latent_size = None
        if resolution is not None:
            latent_size = (resolution // self.spatial_factor,) * 2
        info = PipelineInfo(pipeline, latent_size)
        self.latent_shape = info.latent_shape
        self.image_size = info.image_size
        self.tokenizer = info.tokenizer
        self.num_tokens = info.num_tokens

        # Prompts
        self.truncation_warned = False
        self.prompts: PromptCache | None = None

    def cache_prompts(self, prompts: PromptCache) -> None:
        """Makes `encode` read from `prompts`, and drops the text encoders to free their memory."""
        self.prompts = prompts
        encoders = [name for name in self.pipeline.components if name.startswith("text_encoder")]
        for name in encoders:
            setattr(self.pipeline, name, None)

    def offload(self, *, network: bool, vae: bool) -> None:
        """Moves the network or the VAE to the CPU. `decode` moves the VAE back while it runs."""
        if network:
            self.network.to("cpu")
        if vae:
            self.vae.to("cpu")

    def move_text_encoders(self, device: torch.device | str) -> None:
        """Moves the text encoders. They encode on the device they are on."""
        for name, component in self.pipeline.components.items():
            if name.startswith("text_encoder") and component is not None:
                component.to(device)

    def set_precision(self, precision: str) -> None:
        """Casts the network to `precision`, one of PRECISIONS; x0 stays in float32.

        Raises UserError for float16 on a CPU.
        """
        check_precision(precision, self.device)
        self.network.to(getattr(torch, precision))
        self.precision = precision

    # Prompts

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The network's conditioning of B prompts. Long prompts are truncated as in diffusers."""
        if self.prompts is not None:
            return self.prompts.read(prompts).map(lambda tensor: to_device(tensor, self.device))
        if not self.truncation_warned:
            self.truncation_warned = warn_truncated(self.tokenizer, prompts, self.num_tokens)
        with AsynchronousCopies() if self.device.type == "cuda" else nullcontext():
            cond = self.family.encode(self.pipeline, prompts, self.image_size)
        return cond.to(self.device)

    @torch.no_grad()
    def unconditional(self, negative_prompt: str = "") -> Conditioning:
        """One row: the conditioning without a prompt, as in the stock pipeline's guidance.

        Or that of a negative prompt, from which the stock pipeline guides away instead.
        """
        cond = self.family.unconditional(self.pipeline, self.image_size, negative_prompt)
        return cond.to(self.device)

    # Denoising

    def denoise(
        self,
        x_t: Tensor,
        timestep: float,
        cond: Conditioning,
        network: nn.Module | None = None,
        level: Level | None = None,
    ) -> Tensor:
        """x0 [B, C, h, w] in float32, from the teacher's network or another of the same kind.

        `level` is the noise level of `x_t`: that of `timestep`, unless a solver's levels lie
        between the timesteps.
        """
        if network is None and self.precision != "float32":
            # The network's inputs alone: x0 is computed from the float32 x_t
            dtype = getattr(torch, self.precision)
            output = self.family.output(self.network, x_t.to(dtype), timestep, cond.to(dtype))
        else:
            output = self.family.output(network or self.network, x_t, timestep, cond)
        return to_x0(output, x_t, level or self.level(timestep), self.prediction_type)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [−1, 1] from latents × scaling_factor."""
        previous_device = self.vae.device
        images = autoencoder.decode(self.vae.to(latents.device), latents).clamp(-1, 1)
        self.vae.to(previous_device)
        return images

    # Guidance

    @property
    def guidance(self) -> Literal["classifier_free", "embedded", "none"]:
        """How the model is guided.

        `classifier_free`: two network evaluations per step. `embedded`: the network takes the
        scale as an input (FLUX.1-dev). `none`: distilled without guidance (FLUX.1-schnell).
        """
        embedded = getattr(self.network.config, "guidance_embeds", None)
        if embedded is None or self.family.packed == 1:
            return "classifier_free"
        return "embedded" if embedded else "none"

    def uses_classifier_free_guidance(self, guidance_scale: float) -> bool:
        """Whether `guidance_scale` needs a second, unconditional network evaluation per step.

        Raises UserError if guidance is requested from a teacher that has none, or is not finite.
        """
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale = {guidance_scale}: it must be a finite number.")
        if self.guidance == "none" and guidance_scale > 1:
            raise UserError(
                f"{self.name} was distilled without guidance and cannot use guidance_scale = "
                f"{guidance_scale}; set --guidance-scale 0."
            )
        return self.guidance == "classifier_free" and guidance_scale > 1

    # Noise schedule

    @property
    def last_timestep(self) -> int:
        """T: the largest training timestep, at which the one-step student runs."""
        num_timesteps = int(self.scheduler.config.num_train_timesteps)
        return num_timesteps if self.family.flow else num_timesteps - 1

    @property
    def zero_snr(self) -> bool:
        """Whether the last training timestep is pure noise: ᾱ = 0."""
        return not self.family.flow and self.alpha_bar(self.last_timestep) == 0

    def alpha_bar(self, timestep: int) -> float:
        """ᾱ of a diffusion model at `timestep`; a negative timestep is the end of the ODE."""
        if timestep < 0:
            return float(self.scheduler.final_alpha_cumprod)
        return float(self.scheduler.alphas_cumprod[timestep])

    def level(self, timestep: float) -> Level:
        """The noise level at a timestep."""
        if self.family.flow:
            return Level.flow(timestep / self.scheduler.config.num_train_timesteps)
        return Level.diffusion(self.alpha_bar(int(timestep)))

    def steps(self, num_inference_steps: int, solver: str = "ddim") -> list[Step]:
        """The ODE's steps in order.

        They are at the timesteps of the teacher's scheduler settings, but with `dpm++` a
        diffusion model's are at Karras sigmas, from the last timestep.
        """
        if self.family.flow:
            return self._flow_steps(num_inference_steps)
        if solver == "dpm++":
            alpha_bars = self.scheduler.alphas_cumprod.double().numpy()
            return karras_steps(alpha_bars, num_inference_steps)
        return self._diffusion_steps(num_inference_steps)

    def _diffusion_steps(self, num_inference_steps: int) -> list[Step]:
        set_timesteps(self.scheduler, num_inference_steps, self.name)
        stride = self.scheduler.config.num_train_timesteps // num_inference_steps
        timesteps = self.scheduler.timesteps.tolist()
        return [Step(t, self.level(t), self.level(t - stride)) for t in timesteps]

    def _flow_steps(self, num_inference_steps: int) -> list[Step]:
        """Flux spaces σ from 1 to 1/steps, other models as their scheduler does.

        Each scheduler then applies its shift.
        """
        config = self.scheduler.config
        options: dict[str, Any] = {}
        if config.use_dynamic_shifting:
            options["mu"] = compute_dynamic_shift(config, self.num_image_tokens)
        if self.family.packed > 1 and not config.get("use_flow_sigmas", False):
            options["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, **options)

        # One σ more than timesteps: the last is the end of the ODE
        timesteps = self.scheduler.timesteps.tolist()
        levels = [Level.flow(sigma) for sigma in self.scheduler.sigmas.tolist()]
        steps = []
        for timestep, (current, target) in zip(timesteps, pairwise(levels), strict=True):
            steps.append(Step(timestep, current, target))
        return steps

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of one image in a transformer."""
        _, height, width = self.latent_shape
        patch = self.family.packed * self.network.config.patch_size
        return (height // patch) * (width // patch)


def set_timesteps(scheduler: Any, num_inference_steps: int, name: str) -> None:
    """`scheduler.set_timesteps` of a diffusion model called `name`.

    Raises UserError if there are more steps than training timesteps, or `steps_offset` moves the
    first timestep beyond the last of training.
    """
    last = scheduler.config.num_train_timesteps - 1
    if num_inference_steps <= last + 1:
        scheduler.set_timesteps(num_inference_steps)
        if max(scheduler.timesteps.tolist()) <= last:
            return
    spacing = scheduler.config.get("timestep_spacing", "its spacing")
    raise UserError(
        f"{num_inference_steps} steps do not fit {name}: its training timesteps are 0 to {last}, "
        f"and with {spacing} spacing and steps_offset {scheduler.config.get('steps_offset', 0)} "
        f"the first step would be beyond. Use {last} steps or fewer."
    )


def copy_sharing_weights(network: Any) -> Any:
    """A copy of a network's modules with the same parameter and buffer tensors.

    Modules can be added to the copy, or removed, without a change to the original.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError for float16 on a CPU.

    bfloat16 runs there, slower than float32 on most CPUs.
    """
    if precision == "float16" and device.type == "cpu":
        raise UserError(
            "--precision float16 needs a GPU: on a CPU some layers do not run in it, the others "
            "run slower than in float32. Use --precision float32, or give --device cuda."
        )


def warn_truncated(tokenizer: Any, prompts: Sequence[str], limit: int | None = None) -> bool:
    """Warns if any prompt is longer than `limit` tokens (default: the tokenizer's limit).

    Returns whether it warned.
    """
    limit = limit or tokenizer.model_max_length
    token_ids = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    num_long = sum(len(ids) > limit for ids in token_ids)
    if num_long:
        console.print(
            f"warning: {num_long} of {len(prompts)} prompts are longer than the tokenizer's limit "
            f"of {limit} tokens and are truncated, as in diffusers (this warning appears once).",
            soft_wrap=True,
        )
    return num_long > 0


def ddim_scheduler(config: Any) -> DDIMScheduler:
    """Deterministic DDIM with a pipeline's noise schedule and step spacing, without clipping."""
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def euler_scheduler(config: Any) -> FlowMatchEulerDiscreteScheduler:
    """Deterministic Euler with a flow pipeline's shift, named `flow_shift` or `shift`."""
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return FlowMatchEulerDiscreteScheduler.from_config(
        config, shift=shift, stochastic_sampling=False
    )


def compute_dynamic_shift(config: Any, num_tokens: int) -> float:
    """µ of a schedule that is shifted by resolution: linear in the number of image tokens.

    Esser et al. 2024, section 5.3.2.
    """
    token_range = config.max_image_seq_len - config.base_image_seq_len
    slope = (config.max_shift - config.base_shift) / token_range
    return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))
