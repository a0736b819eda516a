"""The only door to diffusers: any supported pipeline folder becomes `encode`, `denoise` and `decode`."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from diffusion2gan.errors import UserError
from diffusion2gan.pocket import shipped
from diffusion2gan.runtime.progress import console
from diffusion2gan.teacher import autoencoder, hub, variants
from diffusion2gan.teacher.conditioning import Conditioning as Conditioning
from diffusion2gan.teacher.families import FAMILIES, REFUSED
from diffusion2gan.teacher.remember import PromptStore
from diffusion2gan.teacher.schedule import PREDICTIONS, Level, Step, to_x0

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


class Teacher:
    """A frozen text-to-image pipeline. Everything is in eval mode and needs no gradient.

    `resolution` in pixels; the model's own if not given.
    """

    def __init__(
        self, pipeline: Any, name: str, revision: str, resolution: int | None = None, folder: Path | None = None
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
        self.prediction_type: str = "flow_prediction" if self.family.flow else self.scheduler.config.prediction_type
        self.truncation_told = False
        self.device: torch.device = next(self.network.parameters()).device
        self.prompts: PromptStore | None = None

    def remember_prompts(self, prompts: PromptStore) -> None:
        """From now on prompts are looked up there, and the text encoders are gone."""
        self.prompts = prompts
        for name in [name for name in self.pipeline.components if name.startswith("text_encoder")]:
            setattr(self.pipeline, name, None)

    def rest(self, *, network: bool, vae: bool) -> None:
        """Moves what is not needed for now to the CPU; `decode` takes the VAE back while it works."""
        for part in ([self.network] if network else []) + ([self.vae] if vae else []):
            part.to("cpu")

    @property
    def spatial_factor(self) -> int:
        return autoencoder.spatial_factor(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = getattr(self.network.config, "sample_size", None) or self.pipeline.default_sample_size
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
        return [Step(t, *both) for t, both in zip(self.scheduler.timesteps.tolist(), levels, strict=True)]

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
        if not self.truncation_told:
            self.truncation_told = warn_truncated(self.tokenizer, prompts, self.num_tokens)
        return self.family.encode(self.pipeline, prompts, self.pixels).to(self.device)

    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """One row: what the network reads for no prompt, as the stock pipeline guides away from it."""
        return self.family.unconditional(self.pipeline, self.pixels).to(self.device)

    def denoise(self, x_t: Tensor, timestep: float, cond: Conditioning, network: nn.Module | None = None) -> Tensor:
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


def euler(config: Any) -> FlowMatchEulerDiscreteScheduler:
    """Deterministic Euler with a flow pipeline's own shift, whatever its scheduler calls it."""
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift, stochastic_sampling=False)


def shift_of(config: Any, num_tokens: int) -> float:
    """µ of a schedule shifted by resolution: linear in the number of image tokens (Esser et al. 2024, 5.3.2)."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))


def load_teacher(
    name: str = "pocket", device: str | torch.device = "cpu", resolution: int | None = None, *,
    config: str | None = None, loras: str | None = None, vae: str | None = None,
) -> Teacher:  # fmt: skip
    """`pocket`, the folder of a supported diffusers pipeline, a .safetensors of one's weights, or a hub's id: float32.

    `resolution`, the pictures' side in pixels, is the model's own if not given. `config` is a single file's pipeline
    folder; `loras`, `PATH[@SCALE]` with commas between, are merged into the weights; `vae` takes the VAE's place.
    An id, `org/name` or `org/name@revision`, is looked up in the hub's cache on this machine; nothing is downloaded.
    Raises UserError where something is not there, is not supported, or does not fit.
    """
    single, base = variants.is_single_file(name), hub.find(config)[0] if config is not None else None
    if name == "pocket":
        source, told = shipped.folder("teacher"), name
    else:
        source, told = (Path(name), Path(name).name) if single else hub.find(name)
    if single:
        family = check_pipeline_folder(base) if base is not None else None
        pipeline = variants.load_single_file(source, base, family)
        pipeline.set_progress_bar_config(disable=True)
    else:
        check_pipeline_folder(source)
        pipeline = load_pipeline(source)
    check_family(pipeline, source)
    if loras and variants.has_peft():
        variants.merge_loras(pipeline, loras)
    if vae:
        variants.replace_vae(pipeline, vae)
    revision = variants.revision_of(source, base, loras, vae)
    teacher = Teacher(pipeline.to(device), told, revision, resolution, source)
    check_resolution(teacher)
    return teacher


def check_pipeline_folder(folder: Path) -> str:
    """The class name in `model_index.json`. Raises UserError where there is none or it is not supported."""
    index = folder / "model_index.json"
    if not index.is_file():
        what = "is not a folder" if not folder.is_dir() else "has no model_index.json"
        raise UserError(
            f"{folder} is no diffusers pipeline: it {what}. Give `pocket` or a folder that "
            "`DiffusionPipeline.save_pretrained` wrote, or the id of a model in the hub's cache, such as org/name."
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{index} does not name a pipeline class ({error}); save the pipeline again.") from error
    hub.check_no_code(folder)
    if (name := str(name)) not in FAMILIES:
        what = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise UserError(
            f"{folder} is a {name}{what}, which is not supported; supported: {', '.join(FAMILIES)}. Convert it, choose "
            "another teacher, or add its family: CONTRIBUTING.md shows how."
        )
    return name


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained` from disk alone: float32, safetensors only, no remote code, no checker.

    `folder` has a `model_index.json`; which classes may teach is `check_pipeline_folder`'s to say.
    """
    hub.check_no_code(folder)
    options: dict[str, Any] = absent_parts(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index["_class_name"] == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    check_whole(folder, index, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, **options
            )
        except (OSError, ValueError) as error:
            raise UserError(f"the pipeline in {folder} does not load: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_whole(folder: Path, index: dict[str, Any], without: dict[str, Any]) -> None:
    """Raises UserError where a part that `index` names has no folder."""
    parts = [name for name, kind in index.items() if isinstance(kind, list) and name not in without]
    missing = [name for name in parts if not name.startswith("_") and not (folder / name).is_dir()]
    if not missing:
        return
    optional = (
        " Stable Diffusion 3 runs without its third encoder: write text_encoder_3 and tokenizer_3 as [null, null]"
    )
    raise UserError(
        f"{folder} has no {missing[0]}, which its model_index.json names: it was not copied or downloaded whole."
        + (f"{optional} there." if missing[0].endswith("_3") else "")
    )


def absent_parts(folder: Path) -> dict[str, None]:
    """Those that a folder says it is without, as SD3's T5: `from_pretrained` must be told so again."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {name: None for name, kind in index.items() if isinstance(kind, list) and kind[0] is None}


def check_family(pipeline: Any, folder: Path) -> None:
    """Raises UserError where a pipeline of a supported class holds a model that cannot teach."""
    family = FAMILIES[type(pipeline).__name__]
    config, network = pipeline.scheduler.config, getattr(pipeline, family.network).config
    prediction = config.get("prediction_type", "epsilon")
    known = PREDICTIONS[:3] if not family.flow else ("epsilon", "flow_prediction")  # "epsilon": not said
    if prediction not in known:
        raise UserError(f"{folder} predicts {prediction!r}; supported: {', '.join(known)}.")
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr", False):
        raise UserError(
            f"{folder} predicts ε with zero terminal SNR, where ε says nothing of the picture at the last timestep; "
            "its scheduler_config.json should say v_prediction, or rescale_betas_zero_snr: false."
        )
    if "text_encoder" in pipeline.components and pipeline.text_encoder is None:
        raise UserError(
            f"{folder} has no text_encoder: it is the SDXL refiner, or not whole; give the base model's pipeline."
        )
    if getattr(network, "time_cond_proj_dim", None) is not None:
        raise UserError(f"{folder} is already distilled (its network reads a guidance scale); give its own teacher.")
    channels, latents = network.in_channels // family.packed**2, pipeline.vae.config.latent_channels
    if channels != latents:
        raise UserError(
            f"{folder} takes {channels} channels, its VAE makes {latents}: it is an inpainting or editing model; give "
            "a text-to-image one."
        )


def check_resolution(teacher: Teacher) -> None:
    """Raises UserError where the asked resolution is no whole number of the network's patches."""
    patch = teacher.family.packed * getattr(teacher.network.config, "patch_size", 1)
    unit = teacher.spatial_factor * patch
    if teacher.resolution is not None and (teacher.resolution <= 0 or teacher.resolution % unit):
        raise UserError(f"resolution {teacher.resolution}: {teacher.name} makes pictures in steps of {unit} pixels.")
