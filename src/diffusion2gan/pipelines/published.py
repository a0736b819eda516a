"""Published few-step systems, with the scheduler, steps, guidance and prediction type of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from safetensors.torch import load_file
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import check_downloaded, translate_error
from diffusion2gan.teacher import strict_loading

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Euler steps of dx/dt = v(x, t) for t from 0 (noise) to 1 (data) (Liu et al. 2024).

    The network's timestep is (1 − t)·1000. diffusers' flow schedulers have the opposite direction
    and do not fit `StableDiffusionPipeline`.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        t = torch.arange(num_inference_steps, device=device) / num_inference_steps
        self.timesteps = self.config.num_train_timesteps * (1 - t)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        next_sample = sample + model_output / len(self.timesteps)
        if return_dict:
            return SchedulerOutput(prev_sample=next_sample)
        return (next_sample,)


@dataclass(frozen=True)
class PublishedSystem:
    """How a published system is run.

    - `source`: where it is published.
    - `scheduler`: the class of its scheduler, and `settings` that differ from the base pipeline's.
    - `steps`: the numbers of steps it was made for; the first is the default.
    - `any_steps`: any other number of steps is possible, too.
    - `settings_by_steps`: further scheduler settings for a number of steps.
    - `timesteps`: the timesteps for a number of steps, if the scheduler does not choose them.
    - `call`: further arguments of the pipeline's call.
    - `weights`: it is published as a UNet or LoRA file for a base pipeline.
    """

    source: str
    scheduler: type
    steps: tuple[int, ...]
    guidance_scale: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_by_steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    timesteps: Mapping[int, list[int]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    weights: bool = False
    any_steps: bool = False


# Settings are from the systems' public model cards. sd15 and sdxl are DDIM, as the teachers in the
# paper; the paper does not give its guidance scale for SDXL, and 5.0 is diffusers' default.
SYSTEMS: dict[str, PublishedSystem] = {
    "sd15": PublishedSystem(
        source="stable-diffusion-v1-5",
        scheduler=DDIMScheduler,
        steps=(50,),
        any_steps=True,
        guidance_scale=3.0,
        settings={"clip_sample": False, "thresholding": False},
    ),
    "sdxl": PublishedSystem(
        source="stable-diffusion-xl-base-1.0",
        scheduler=DDIMScheduler,
        steps=(50,),
        any_steps=True,
        guidance_scale=5.0,
        settings={"clip_sample": False, "thresholding": False},
    ),
    "instaflow-0.9b": PublishedSystem(
        source="instaflow_0_9B_from_sd_1_5",
        scheduler=RectifiedFlowScheduler,
        steps=(1,),
        guidance_scale=0.0,
    ),
    "sdxl-turbo": PublishedSystem(
        source="sdxl-turbo",
        scheduler=EulerAncestralDiscreteScheduler,
        steps=(1, 2, 3, 4),
        guidance_scale=0.0,
        settings={"timestep_spacing": "trailing"},
    ),
    "sdxl-lightning": PublishedSystem(
        source="SDXL-Lightning",
        scheduler=EulerDiscreteScheduler,
        steps=(1, 2, 4, 8),
        guidance_scale=0.0,
        settings={"timestep_spacing": "trailing"},
        settings_by_steps={1: {"prediction_type": "sample"}},
        weights=True,
    ),
    "lcm": PublishedSystem(
        source="LCM_Dreamshaper_v7",
        scheduler=LCMScheduler,
        steps=(4, 1, 2, 3, 5, 6, 7, 8),
        guidance_scale=8.0,
    ),
    "dmd2": PublishedSystem(
        source="DMD2",
        scheduler=LCMScheduler,
        steps=(1, 4),
        guidance_scale=0.0,
        timesteps={1: [399], 4: [999, 749, 499, 249]},
        weights=True,
    ),
    "hyper-sd": PublishedSystem(
        source="Hyper-SD, UNet",
        scheduler=LCMScheduler,
        steps=(1,),
        guidance_scale=0.0,
        timesteps={1: [800]},
        weights=True,
    ),
    "hyper-sd-lora": PublishedSystem(
        source="Hyper-SD, LoRA for 2 to 8 steps",
        scheduler=DDIMScheduler,
        steps=(2, 4, 8),
        guidance_scale=0.0,
        settings={"timestep_spacing": "trailing"},
        weights=True,
    ),
    "hyper-sd-lora-1step": PublishedSystem(
        source="Hyper-SD, LoRA for 1 step",
        scheduler=TCDScheduler,
        steps=(1,),
        guidance_scale=0.0,
        call={"eta": 1.0},
        weights=True,
    ),
}

# Systems of which only images are public.
PICTURES_ONLY = {
    "gigagan": "no weights are public: give a folder of its images, named by caption index"
}


def choose_num_steps(name: str, requested: int | None, weights: Path | None) -> int:
    """The number of steps: as requested, as in the weights' file name, or the system's default.

    A file name gives it as in `…_4step_…`. Raises UserError if the system was not made for that
    number of steps, or the file is for another one.
    """
    system = SYSTEMS[name]
    in_name = re.search(r"(\d+)[-_]?steps?", weights.name, re.I) if weights else None
    steps_of_file = int(in_name[1]) if in_name else None
    if requested is not None and steps_of_file is not None and requested != steps_of_file:
        raise UserError(
            f"{weights} is for {steps_of_file} steps, but --num-inference-steps is {requested}; "
            f"give the file for {requested} steps, or leave the option out"
        )

    steps = requested or steps_of_file or system.steps[0]
    if steps not in system.steps and not system.any_steps:
        supported = ", ".join(str(number) for number in sorted(system.steps))
        raise UserError(f"{name} is made for {supported} steps, not for {steps}")
    return steps


def build_scheduler(
    system: PublishedSystem, config: Mapping[str, Any], num_inference_steps: int
) -> Any:
    """The system's scheduler with the base pipeline's noise schedule."""
    if system.scheduler is RectifiedFlowScheduler:
        return RectifiedFlowScheduler()
    scheduler_class: Any = system.scheduler
    settings = {**system.settings, **system.settings_by_steps.get(num_inference_steps, {})}
    return scheduler_class.from_config(config, **settings)


def call_arguments(system: PublishedSystem, num_inference_steps: int) -> dict[str, Any]:
    """Further arguments of the pipeline's call."""
    arguments = dict(system.call)
    if num_inference_steps in system.timesteps:
        arguments["timesteps"] = system.timesteps[num_inference_steps]
    return arguments


def load_weights(pipeline: DiffusionPipeline, path: Path) -> None:
    """Loads a published UNet or LoRA into its base pipeline.

    Raises UserError if the file cannot be read or does not fit.
    """
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path} is not a weights file ({', '.join(SUFFIXES)}); write the system as "
            "NAME=PIPELINE+FILE"
        )

    # A LoRA
    tensors = _read_tensors(path)
    if any("lora" in name for name in tensors):
        _merge_lora(pipeline, path, tensors)
        return

    # A complete UNet
    expected = set(pipeline.unet.state_dict())
    found = set(tensors)
    if expected != found:
        missing = sorted(expected - found)
        unknown = sorted(found - expected)
        raise UserError(
            f"{path} does not fit the pipeline's UNet: {len(missing)} tensors are missing (such as "
            f"{missing[:1]}) and {len(unknown)} are unknown (such as {unknown[:1]}). Check that "
            "the base pipeline is the model that the weights were made from."
        )
    try:
        pipeline.unet.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the pipeline's UNet: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    check_downloaded(path)
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # Damaged files raise errors of their format: safetensors, zip, unpickling
        failure = translate_error(path, error)
        if failure is not None:
            raise failure from error
        raise UserError(f"{path} cannot be read ({error}); download it again") from error


def _merge_lora(pipeline: DiffusionPipeline, path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        strict_loading.load_lora(pipeline, path, tensors)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except UserError:
        raise
    except Exception as error:
        failure = translate_error(path, error)
        if failure is not None:
            raise failure from error
        # A LoRA of other layers or sizes raises many kinds: ValueError, KeyError, RuntimeError, …
        if "peft" in str(error).lower():
            raise UserError(
                f"{path} is a LoRA, which needs the package peft: pip install peft"
            ) from error
        reason = strict_loading.describe_error(error)
        raise UserError(f"{path} does not fit the pipeline: {reason}") from error
