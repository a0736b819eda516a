"""Anything that makes pictures from prompts and noises, run by its own stock pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.pocket import shipped
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.images import to_uint8
from diffusion2gan.teacher.families import FAMILIES
from diffusion2gan.teacher.pipeline import check_pipeline_folder, ddim, load_pipeline

POCKET = ("pocket-teacher", "pocket-student")


@dataclass(frozen=True)
class System:
    """A stock pipeline with its settings. `key` names everything its pictures depend on."""

    name: str
    pipeline: DiffusionPipeline
    num_inference_steps: int
    guidance_scale: float
    revision: str

    @property
    def key(self) -> str:
        return f"{self.revision}-{self.num_inference_steps}-{self.guidance_scale:g}"

    @property
    def note(self) -> str:
        return "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.unet.config
        size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return (config.in_channels, *size)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor) -> NDArray[np.uint8]:
        """[B, H, W, 3] pictures from `noise` [B, C, h, w]."""
        images = self.pipeline(
            list(prompts), latents=noise, num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale, output_type="pt",
        ).images  # fmt: skip
        return to_uint8(images * 2 - 1)

    def timings(self, prompts: Sequence[str], noise: Tensor, repeats: int = 5) -> dict[str, float]:
        """Median seconds of one picture alone, and pictures a second in one batch of all of `noise`."""
        self.generate(prompts[:1], noise[:1])
        singles = [_seconds(lambda: self.generate(prompts[:1], noise[:1])) for _ in range(repeats)]
        batch = _seconds(lambda: self.generate(prompts, noise))
        return {"seconds_per_image": float(np.median(singles)), "images_per_second": len(noise) / batch}


def _seconds(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def load_system(name: str, num_inference_steps: int | None = None, guidance_scale: float | None = None) -> System:
    """`pocket-teacher`, `pocket-student` or a pipeline folder; one-step students know their own settings.

    Raises UserError where the folder is no supported pipeline, or a one-step student is asked for other settings.
    """
    if name == "pocket-student":
        pipeline, revision = _pocket_student()
    else:
        folder = shipped.folder("teacher") if name == "pocket-teacher" else Path(name)
        kind = check_pipeline_folder(folder)
        if FAMILIES[kind].flow:
            raise UserError(f"{name} is a {kind}: flow models are not run here yet; call the pipeline itself")
        pipeline, revision = load_pipeline(folder), sha256(folder)[:16]
    scheduler = pipeline.scheduler
    if isinstance(scheduler, LCMScheduler) and scheduler.config.original_inference_steps == 1:
        if num_inference_steps not in (None, 1) or (guidance_scale or 0) > 1:
            raise UserError(f"{name} is a one-step student: it runs with num_inference_steps=1 and guidance_scale=0")
        return System(name, pipeline, 1, 0.0, revision)
    pipeline.scheduler = ddim(scheduler.config)
    steps = shipped.NUM_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps
    guidance = shipped.GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    return System(name, pipeline, steps, guidance, revision)


def _pocket_student() -> tuple[DiffusionPipeline, str]:
    """The shipped student: its UNet in the teacher's pipeline."""
    pipeline, folder = load_pipeline(shipped.folder("teacher")), shipped.folder("student")
    pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).eval()
    pipeline.unet.to(torch.float32)
    pipeline.scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    return pipeline, sha256(folder)[:16]
