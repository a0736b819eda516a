"""Published systems: which scheduler, steps, guidance and prediction type each was made for. One row a system."""

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

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Euler steps of dx/dt = v(x, t), t from 0 (noise) to 1, the network told (1 − t)·1000 (Liu et al. 2024).

    Diffusers' own flow schedulers go the other way round and do not fit `StableDiffusionPipeline`.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        steps = torch.arange(num_inference_steps, device=device) / num_inference_steps
        self.timesteps = self.config.num_train_timesteps * (1 - steps)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        following = sample + model_output / len(self.timesteps)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)


@dataclass(frozen=True)
class Row:
    """How a system is run: its scheduler with `settings`, one of `steps` (none: any; the first if not said).

    `at[n]` adds settings for n steps, `timesteps[n]` names the timesteps of n steps, `call` are further arguments of
    the pipeline. `weights`: published as UNet or LoRA files for a base pipeline. `where`: its public home.
    """

    where: str
    scheduler: type
    steps: tuple[int, ...]
    guidance_scale: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    at: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    timesteps: Mapping[int, list[int]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    weights: bool = False
    any_steps: bool = False


UNCLIPPED = {"clip_sample": False, "thresholding": False}
TRAILING = {"timestep_spacing": "trailing"}
DMD2_STEPS = {1: [399], 4: [999, 749, 499, 249]}

# From each one's public model card. sd15 and sdxl: DDIM as the paper's teachers; its guidance for SDXL is not published
# and 5.0 is diffusers' default. One line adds another.
ROWS: dict[str, Row] = {
    "sd15": Row("stable-diffusion-v1-5", DDIMScheduler, (50,), 3.0, UNCLIPPED, any_steps=True),
    "sdxl": Row(
        "stable-diffusion-xl-base-1.0", DDIMScheduler, (50,), 5.0, UNCLIPPED, any_steps=True
    ),
    "instaflow-0.9b": Row("instaflow_0_9B_from_sd_1_5", RectifiedFlowScheduler, (1,), 0.0),
    "sdxl-turbo": Row("sdxl-turbo", EulerAncestralDiscreteScheduler, (1, 2, 3, 4), 0.0, TRAILING),
    "sdxl-lightning": Row(
        "SDXL-Lightning",
        EulerDiscreteScheduler,
        (1, 2, 4, 8),
        0.0,
        TRAILING,
        at={1: {"prediction_type": "sample"}},
        weights=True,
    ),
    "lcm": Row("LCM_Dreamshaper_v7", LCMScheduler, (4, 1, 2, 3, 5, 6, 7, 8), 8.0),
    "dmd2": Row("DMD2", LCMScheduler, (1, 4), 0.0, timesteps=DMD2_STEPS, weights=True),
    "hyper-sd": Row("Hyper-SD, UNet", LCMScheduler, (1,), 0.0, timesteps={1: [800]}, weights=True),
    "hyper-sd-lora": Row(
        "Hyper-SD, LoRA of 2 to 8 steps", DDIMScheduler, (2, 4, 8), 0.0, TRAILING, weights=True
    ),
    "hyper-sd-lora-1step": Row(
        "Hyper-SD, LoRA of 1 step", TCDScheduler, (1,), 0.0, call={"eta": 1.0}, weights=True
    ),
}
PICTURES_ONLY = {
    "gigagan": "no weights are public: give a folder of its pictures, named by caption index"
}


def steps_of(name: str, asked: int | None, weights: Path | None) -> int:
    """How many steps: as `asked`, as the weights' file name says (`…_4step_…`), or the row's first.

    Raises UserError where the system is not made for so many, or the file is of another number.
    """
    row = ROWS[name]
    told = re.search(r"(\d+)[-_]?steps?", weights.name, re.I) if weights else None
    of_file = int(told[1]) if told else None
    if asked is not None and of_file is not None and asked != of_file:
        raise UserError(
            f"{weights} is for {of_file} steps, --num-inference-steps says {asked}; give the file for it"
        )
    steps = asked or of_file or row.steps[0]
    if not row.any_steps and steps not in row.steps:
        raise UserError(
            f"{name} is made for {', '.join(map(str, sorted(row.steps)))} steps, not for {steps}"
        )
    return steps


def scheduler_of(row: Row, config: Mapping[str, Any], num_inference_steps: int) -> Any:
    """The row's scheduler, with the base pipeline's noise schedule and the row's settings."""
    if row.scheduler is RectifiedFlowScheduler:
        return RectifiedFlowScheduler()
    return row.scheduler.from_config(config, **row.settings, **row.at.get(num_inference_steps, {}))  # type: ignore[attr-defined]


def call_of(row: Row, num_inference_steps: int) -> dict[str, Any]:
    """Further arguments of the pipeline's call."""
    steps = row.timesteps.get(num_inference_steps)
    return dict(row.call) | ({"timesteps": steps} if steps else {})


def load_weights(pipeline: DiffusionPipeline, path: Path) -> None:
    """Puts a published UNet, or a LoRA, into its base pipeline. Raises UserError where it does not fit."""
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} is no weights file ({', '.join(SUFFIXES)}); write the system as NAME=PIPELINE+FILE"
        )
    tensors = _read(path)
    if any("lora" in key for key in tensors):
        _load_lora(pipeline, path, tensors)
        return
    expected, there = set(pipeline.unet.state_dict()), set(tensors)
    if expected != there:
        missing, more = sorted(expected - there), sorted(there - expected)
        raise UserError(
            f"{path} does not fit the pipeline's UNet: {len(missing)} tensors are missing (such as {missing[:1]}) and "
            f"{len(more)} are unknown (such as {more[:1]}). Is the base the model it was made from?"
        )
    try:
        pipeline.unet.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the pipeline's UNet: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file raises by its format: safetensors, zip, unpickling
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error


def _load_lora(pipeline: DiffusionPipeline, path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        pipeline.load_lora_weights(tensors)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except (ImportError, ValueError) as error:
        if "peft" in str(error).lower():
            raise UserError(
                f"{path} is a LoRA, which needs the package peft: pip install peft"
            ) from error
        raise UserError(f"{path} does not fit the pipeline: {error}") from error
