"""Anything that makes pictures from prompts and noises, run by its own stock pipeline."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.errors import UserError, nearest
from diffusion2gan.pipelines import published, timing
from diffusion2gan.runtime.files import read_json, sha256
from diffusion2gan.runtime.images import to_uint8
from diffusion2gan.teacher.autoencoder import spatial_factor
from diffusion2gan.teacher.families import FAMILIES, pack
from diffusion2gan.teacher.hub import find
from diffusion2gan.teacher.loading import (
    check_family,
    check_pipeline_folder,
    check_resolution,
    load_pipeline,
)
from diffusion2gan.teacher.one_step import is_one_step
from diffusion2gan.teacher.pipeline import Teacher, ddim

POCKET = ("pocket-teacher", "pocket-student")
# Pipelines that make pictures from `latents` [B, C, h, w] but (yet) teach nothing here.
MORE_PIPELINES = ("StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
ROW = re.compile(r"[\w.-]+")
AT_SIZE = re.compile(r"(.+)@(\d+)px")


@dataclass(frozen=True)
class System:
    """A stock pipeline with its settings. `key` names everything its pictures depend on.

    `call`: further arguments of the pipeline, such as `timesteps`. `latent_size`: height and width of its latents, the
    model's own if not given.
    """

    name: str
    pipeline: DiffusionPipeline
    num_inference_steps: int
    guidance_scale: float
    revision: str
    call: Mapping[str, Any] = field(default_factory=dict)
    latent_size: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        more = "".join(f"-{key}{value}" for key, value in sorted(self.call.items()))
        more += f"-{self.latent_size}" if self.latent_size else ""
        plain = (
            type(self.pipeline.scheduler).__name__ in ("DDIMScheduler", "LCMScheduler") and not more
        )
        drawn = (
            ""
            if plain
            else hashlib.sha256(f"{more}{self.pipeline.scheduler.config}".encode()).hexdigest()[:8]
        )
        kind = (self.device.partition(":")[0], self.precision)
        where = [] if kind == ("cpu", "float32") else kind
        told = (
            self.revision,
            str(self.num_inference_steps),
            f"{self.guidance_scale:g}",
            drawn,
            *where,
        )
        return "-".join(part for part in told if part)

    @property
    def note(self) -> str:
        return "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"

    @property
    def network(self) -> Any:
        return getattr(self.pipeline, "transformer", None) or self.pipeline.unet

    @property
    def packed(self) -> int:
        """How many times smaller the network sees a latent grid: 2 for Flux."""
        family = FAMILIES.get(type(self.pipeline).__name__)
        return family.packed if family else 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.network.config
        size = (
            self.latent_size
            or getattr(config, "sample_size", None)
            or self.pipeline.default_sample_size
        )
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels // self.packed**2, height, width)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its pictures."""
        _, height, width = self.latent_shape
        factor = spatial_factor(self.pipeline.vae)
        return height * factor, width * factor

    @property
    def tokenizer(self) -> Any:
        """The one that reads most of a prompt."""
        family = FAMILIES.get(type(self.pipeline).__name__)
        return (
            getattr(self.pipeline, family.tokenizer) if family else None
        ) or self.pipeline.tokenizer

    @property
    def num_tokens(self) -> int:
        """How much of a prompt is read, in its tokenizer's tokens."""
        family = FAMILIES.get(type(self.pipeline).__name__)
        own = int(self.tokenizer.model_max_length)
        return min(own, family.num_tokens) if family and family.num_tokens else own

    @property
    def device(self) -> str:
        return str(next(self.network.parameters()).device)

    @property
    def precision(self) -> str:
        return str(next(self.network.parameters()).dtype).removeprefix("torch.")

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor) -> NDArray[np.uint8]:
        """[B, H, W, 3] pictures from `noise` [B, C, h, w], which also seeds what a scheduler draws on the way."""
        given = noise.to(self.network.dtype).to(self.device)
        images = self.pipeline(
            list(prompts),
            latents=pack(given) if self.packed > 1 else given,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            output_type="pt",
            generator=[_generator(row) for row in noise],
            **self._size(),
            **self.call,
        ).images
        return to_uint8(images * 2 - 1)

    def _size(self) -> dict[str, Any]:
        """Height and width in pixels, exactly these (Sana would look for the nearest it was trained at)."""
        height, width = self.pixels
        binned = (
            "use_resolution_binning" in inspect.signature(type(self.pipeline).__call__).parameters
        )
        exactly = {"use_resolution_binning": False} if binned else {}
        return {"height": height, "width": width} | exactly

    def timings(
        self, prompts: Sequence[str], noise: Tensor, repeats: int = timing.REPEATS
    ) -> dict[str, float]:
        """Seconds of one picture alone (median, and what nine of ten stay below), and pictures a second in one batch.

        `peak_memory_bytes` is of one picture; left out where the system does not tell.
        """
        seconds = timing.latencies(
            lambda: self.generate(prompts[:1], noise[:1]), repeats, self.device
        )
        median, p90 = timing.median_and_p90(seconds)
        batch = timing.seconds_of(lambda: self.generate(prompts, noise), self.device)
        memory = timing.peak_memory_bytes(
            lambda: self.generate(prompts[:1], noise[:1]), self.device
        )
        told = {
            "seconds_per_image": median,
            "seconds_per_image_p90": p90,
            "images_per_second": len(noise) / batch,
        }
        return told if memory is None else told | {"peak_memory_bytes": memory}


def _generator(noise: Tensor) -> torch.Generator:
    """A CPU generator that depends on one picture's noise alone: not on its batch, rank or device."""
    digest = hashlib.sha256(noise.detach().float().cpu().numpy().tobytes()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "big"))


def load_system(
    name: str,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    device: str = "cpu",
    precision: str = "float32",
    resolution: int | None = None,
) -> System:
    """`pocket-teacher`, `pocket-student`, a pipeline folder, or ROW=FOLDER of a published system.

    One-step students and published systems know their own settings. A system published as weights alone is
    ROW=FOLDER+FILE: its base pipeline and the file. `resolution`, or FOLDER@512px: the side of a teacher's pictures in
    pixels, its own if not given; a student has that of its pairs. Raises UserError where the folder is no supported
    pipeline, the row is unknown, or a system is asked for steps or a size it is not made for.
    """
    check_device(device)
    row, equals, path = name.partition("=")
    sized = None if Path(name).exists() else AT_SIZE.fullmatch(name)
    folder = sized[1] if sized else name
    if not (equals or "/" in folder or folder in POCKET or Path(folder).exists()):
        raise UserError(
            f"{folder} is not a folder{nearest(folder, POCKET)}. Or give a folder that "
            "`DiffusionPipeline.save_pretrained` wrote; models of a hub are downloaded first, nothing here does it."
        )
    if equals and ROW.fullmatch(row):
        system = _published(name, row, path, num_inference_steps, guidance_scale)
    else:
        system = _own(
            folder, num_inference_steps, guidance_scale, int(sized[2]) if sized else resolution
        )
    if (device, precision) != ("cpu", "float32"):
        system.pipeline.to(device, getattr(torch, precision))
    return system


def _own(
    name: str, num_inference_steps: int | None, guidance_scale: float | None, resolution: int | None
) -> System:
    if name == "pocket-student":
        pipeline, revision = _pocket_student()
        folder = assets.folder("student")
    else:
        folder = assets.folder("teacher") if name == "pocket-teacher" else find(name)[0]
        pipeline, revision = _load(folder), sha256(folder)[:16]
    if is_one_step(pipeline.scheduler):
        if num_inference_steps not in (None, 1) or (guidance_scale or 0) > 1:
            raise UserError(
                f"{name} is a one-step student: it runs with num_inference_steps=1 and guidance_scale=0"
            )
        return _sized(System(name, pipeline, 1, 0.0, revision), size_of_pairs(folder))
    steps = assets.NUM_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps
    guidance = assets.GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    if type(pipeline).__name__ not in FAMILIES:
        pipeline.scheduler = ddim(pipeline.scheduler.config)
        return System(name, pipeline, steps, guidance, revision)
    check_family(pipeline, folder)
    teacher = Teacher(pipeline, folder.name, revision, resolution)
    check_resolution(teacher)
    if teacher.guidance == "none" and guidance_scale is None:
        guidance = 0.0
    teacher.is_guided(guidance)  # refuses what it cannot do
    pipeline.scheduler = teacher.scheduler
    return _sized(System(name, pipeline, steps, guidance, revision), teacher.latent_shape[1:])


def _sized(system: System, size: tuple[int, int] | None) -> System:
    """The same, its latents of `size`; as it is where they are so by themselves."""
    return system if size in (None, system.latent_shape[1:]) else replace(system, latent_size=size)


def size_of_pairs(folder: Path) -> tuple[int, int] | None:
    """Height and width of the latents that an export learnt from, by its own description; None without one."""
    path = folder / "diffusion2gan.json"
    if not path.is_file():
        return None
    _, height, width = read_json(path)["pairs"]["latent_shape"]
    return int(height), int(width)


def check_device(name: str) -> None:
    """Raises UserError where torch knows no such device, or this machine has none."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} cannot be used here ({why}); name cpu, or one that this torch finds"
        ) from error


def _published(
    name: str, row_name: str, path: str, steps: int | None, guidance_scale: float | None
) -> System:
    if row_name in published.PICTURES_ONLY:
        raise UserError(f"{row_name}: {published.PICTURES_ONLY[row_name]}; it cannot make new ones")
    if row_name not in published.ROWS:
        known = [*published.ROWS, *published.PICTURES_ONLY]
        raise UserError(f"no published system {row_name!r} is known here{nearest(row_name, known)}")
    row = published.ROWS[row_name]
    base, plus, file = path.partition("+")
    if row.weights != bool(plus):
        form = (
            "FOLDER+FILE, its base pipeline and its weights"
            if row.weights
            else "FOLDER, its pipeline"
        )
        raise UserError(f"{name}: write it as {row_name}={form}")
    weights = Path(file) if plus else None
    num = published.steps_of(row_name, steps, weights)
    guidance = row.guidance_scale if guidance_scale is None else guidance_scale
    if row.guidance_scale == 0 and guidance > 1:
        raise UserError(
            f"{row_name} runs without guidance; leave --guidance-scale {guidance:g} out"
        )
    pipeline, revision = _load(Path(base)), sha256(Path(base))[:16]
    if weights is not None:
        published.load_weights(pipeline, weights)
        revision = hashlib.sha256(f"{revision}{sha256(weights)}".encode()).hexdigest()[:16]
    pipeline.scheduler = published.scheduler_of(row, pipeline.scheduler.config, num)
    return System(name, pipeline, num, guidance, revision, published.call_of(row, num))


def _load(folder: Path) -> DiffusionPipeline:
    """A pipeline folder of a class that makes pictures from noise."""
    index = folder / "model_index.json"
    try:
        known = json.loads(index.read_text(encoding="utf-8")).get("_class_name") in MORE_PIPELINES
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        check_pipeline_folder(folder)
    return load_pipeline(folder)


def _pocket_student() -> tuple[DiffusionPipeline, str]:
    """The shipped student: its UNet in the teacher's pipeline."""
    pipeline, folder = load_pipeline(assets.folder("teacher")), assets.folder("student")
    pipeline.unet = UNet2DConditionModel.from_pretrained(
        folder / "unet", use_safetensors=True
    ).eval()
    pipeline.unet.to(torch.float32)
    pipeline.scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    return pipeline, sha256(folder)[:16]
