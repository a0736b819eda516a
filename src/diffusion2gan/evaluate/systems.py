"""Anything that makes pictures from prompts and noises, run by its own stock pipeline."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.evaluate import published, timing
from diffusion2gan.pocket import shipped
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.images import to_uint8
from diffusion2gan.teacher.families import FAMILIES
from diffusion2gan.teacher.pipeline import check_pipeline_folder, ddim, load_pipeline

POCKET = ("pocket-teacher", "pocket-student")
# Pipelines that make pictures from `latents` [B, C, h, w] but (yet) teach nothing here.
MORE_PIPELINES = ("StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
ROW = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class System:
    """A stock pipeline with its settings. `key` names everything its pictures depend on.

    `call`: further arguments of the pipeline, such as `timesteps`.
    """

    name: str
    pipeline: DiffusionPipeline
    num_inference_steps: int
    guidance_scale: float
    revision: str
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        more = "".join(f"-{key}{value}" for key, value in sorted(self.call.items()))
        plain = type(self.pipeline.scheduler).__name__ in ("DDIMScheduler", "LCMScheduler") and not more
        drawn = "" if plain else hashlib.sha256(f"{more}{self.pipeline.scheduler.config}".encode()).hexdigest()[:8]
        kind = (self.device.partition(":")[0], self.precision)
        where = [] if kind == ("cpu", "float32") else kind
        told = (self.revision, str(self.num_inference_steps), f"{self.guidance_scale:g}", drawn, *where)
        return "-".join(part for part in told if part)

    @property
    def note(self) -> str:
        return "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipeline.unet.config
        size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return (config.in_channels, *size)

    @property
    def device(self) -> str:
        return str(next(self.pipeline.unet.parameters()).device)

    @property
    def precision(self) -> str:
        return str(next(self.pipeline.unet.parameters()).dtype).removeprefix("torch.")

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor) -> NDArray[np.uint8]:
        """[B, H, W, 3] pictures from `noise` [B, C, h, w], which also seeds what a scheduler draws on the way."""
        images = self.pipeline(
            list(prompts), latents=noise.to(self.pipeline.unet.dtype).to(self.device),
            num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale, output_type="pt",
            generator=[_generator(row) for row in noise], **self.call,
        ).images  # fmt: skip
        return to_uint8(images * 2 - 1)

    def timings(self, prompts: Sequence[str], noise: Tensor, repeats: int = timing.REPEATS) -> dict[str, float]:
        """Seconds of one picture alone (median, and what nine of ten stay below), and pictures a second in one batch.

        `peak_memory_bytes` is of one picture; left out where the system does not tell.
        """
        seconds = timing.latencies(lambda: self.generate(prompts[:1], noise[:1]), repeats, self.device)
        median, p90 = timing.median_and_p90(seconds)
        batch = timing.seconds_of(lambda: self.generate(prompts, noise), self.device)
        memory = timing.peak_memory_bytes(lambda: self.generate(prompts[:1], noise[:1]), self.device)
        told = {"seconds_per_image": median, "seconds_per_image_p90": p90, "images_per_second": len(noise) / batch}
        return told if memory is None else told | {"peak_memory_bytes": memory}


def _generator(noise: Tensor) -> torch.Generator:
    """A CPU generator that depends on one picture's noise alone: not on its batch, rank or device."""
    digest = hashlib.sha256(noise.detach().float().cpu().numpy().tobytes()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "big"))


def load_system(
    name: str, num_inference_steps: int | None = None, guidance_scale: float | None = None, device: str = "cpu",
    precision: str = "float32",
) -> System:  # fmt: skip
    """`pocket-teacher`, `pocket-student`, a pipeline folder, or ROW=FOLDER of a published system.

    One-step students and published systems know their own settings. A system published as weights alone is
    ROW=FOLDER+FILE: its base pipeline and the file. Raises UserError where the folder is no supported pipeline, the
    row is unknown, or a system is asked for steps it is not made for.
    """
    check_device(device)
    row, equals, path = name.partition("=")
    if near := "" if equals or name in POCKET or Path(name).exists() else nearest(name, POCKET):
        raise UserError(
            f"{name} is not a folder{near}. Or give a folder that `DiffusionPipeline.save_pretrained` wrote; models of "
            "a hub are downloaded first, nothing here does it."
        )
    if equals and ROW.fullmatch(row):
        system = _published(name, row, path, num_inference_steps, guidance_scale)
    else:
        system = _own(name, num_inference_steps, guidance_scale)
    if (device, precision) != ("cpu", "float32"):
        system.pipeline.to(device, getattr(torch, precision))
    return system


def _own(name: str, num_inference_steps: int | None, guidance_scale: float | None) -> System:
    if name == "pocket-student":
        pipeline, revision = _pocket_student()
    else:
        folder = shipped.folder("teacher") if name == "pocket-teacher" else Path(name)
        pipeline, revision = _load(folder), sha256(folder)[:16]
    scheduler = pipeline.scheduler
    if isinstance(scheduler, LCMScheduler) and scheduler.config.original_inference_steps == 1:
        if num_inference_steps not in (None, 1) or (guidance_scale or 0) > 1:
            raise UserError(f"{name} is a one-step student: it runs with num_inference_steps=1 and guidance_scale=0")
        return System(name, pipeline, 1, 0.0, revision)
    pipeline.scheduler = ddim(scheduler.config)
    steps = shipped.NUM_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps
    guidance = shipped.GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    return System(name, pipeline, steps, guidance, revision)


def check_device(name: str) -> None:
    """Raises UserError where torch knows no such device, or this machine has none."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({why}); name cpu, or one that this torch finds"
        ) from error


def _published(name: str, row_name: str, path: str, steps: int | None, guidance_scale: float | None) -> System:
    if row_name in published.PICTURES_ONLY:
        raise UserError(f"{row_name}: {published.PICTURES_ONLY[row_name]}; it cannot make new ones")
    if row_name not in published.ROWS:
        known = [*published.ROWS, *published.PICTURES_ONLY]
        raise UserError(f"no published system {row_name!r} is known here{nearest(row_name, known)}")
    row = published.ROWS[row_name]
    base, plus, file = path.partition("+")
    if row.weights != bool(plus):
        form = "FOLDER+FILE, its base pipeline and its weights" if row.weights else "FOLDER, its pipeline"
        raise UserError(f"{name}: write it as {row_name}={form}")
    weights = Path(file) if plus else None
    num = published.steps_of(row_name, steps, weights)
    guidance = row.guidance_scale if guidance_scale is None else guidance_scale
    if row.guidance_scale == 0 and guidance > 1:
        raise UserError(f"{row_name} runs without guidance; leave --guidance-scale {guidance:g} out")
    pipeline, revision = _load(Path(base)), sha256(Path(base))[:16]
    if weights is not None:
        published.load_weights(pipeline, weights)
        revision = hashlib.sha256(f"{revision}{sha256(weights)}".encode()).hexdigest()[:16]
    pipeline.scheduler = published.scheduler_of(row, pipeline.scheduler.config, num)
    return System(name, pipeline, num, guidance, revision, published.call_of(row, num))


def _load(folder: Path) -> DiffusionPipeline:
    """A pipeline folder of a class that makes pictures from a UNet's noise."""
    index = folder / "model_index.json"
    try:
        known = json.loads(index.read_text(encoding="utf-8")).get("_class_name") in MORE_PIPELINES
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        kind = check_pipeline_folder(folder)
        if FAMILIES[kind].flow:
            raise UserError(f"{folder} is a {kind}: flow models are not run here yet; call the pipeline itself")
    return load_pipeline(folder)


def _pocket_student() -> tuple[DiffusionPipeline, str]:
    """The shipped student: its UNet in the teacher's pipeline."""
    pipeline, folder = load_pipeline(shipped.folder("teacher")), shipped.folder("student")
    pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).eval()
    pipeline.unet.to(torch.float32)
    pipeline.scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    return pipeline, sha256(folder)[:16]
