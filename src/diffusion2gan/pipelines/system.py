"""Systems: stock pipelines with fixed settings that generate images from prompts and noise."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import time
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
from diffusion2gan.errors import Failure, UserError, nearest
from diffusion2gan.pipelines import published, timing
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.files import read_json, sha256
from diffusion2gan.runtime.images import to_uint8
from diffusion2gan.teacher.families import FAMILIES, pack
from diffusion2gan.teacher.hub import find_model
from diffusion2gan.teacher.loading import (
    check_can_teach,
    check_noise_schedule,
    check_pipeline_folder,
    check_resolution,
    load_pipeline,
)
from diffusion2gan.teacher.one_step import is_one_step
from diffusion2gan.teacher.pipeline import Teacher, ddim_scheduler, set_timesteps
from diffusion2gan.teacher.pipeline_info import PipelineInfo
from diffusion2gan.teacher.strict_loading import load_model, translated_errors

POCKET = ("pocket-teacher", "pocket-student")

# Pipeline classes that run with `latents` [B, C, h, w], although not all of them can be teachers.
ALSO_RUNNABLE = ("StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")

PUBLISHED_NAME = re.compile(r"[\w.-]+")
WITH_RESOLUTION = re.compile(r"(.+)@(\d+)px")


@dataclass(frozen=True)
class System:
    """A stock pipeline with its settings.

    `call`: further arguments of the pipeline's call, such as `timesteps`. `latent_size`: height
    and width of its latents, the model's default if not given.
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
        """Identifies all settings that the images depend on, besides prompt and noise.

        The weights' revision, the steps and the guidance scale, then a digest of all settings.
        """
        scheduler = self.pipeline.scheduler
        settings = {
            "revision": self.revision,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": float(self.guidance_scale),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {
                name: value for name, value in scheduler.config.items() if not name.startswith("_")
            },
            "call": dict(self.call),
            "latent_size": self.latent_size,
            "device": self.device.partition(":")[0],
            "precision": self.precision,
        }

        # Digest
        text = json.dumps(settings, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        steps = self.num_inference_steps
        return f"{self.revision}-{steps}-{self.guidance_scale:g}-{digest[:12]}"

    @property
    def note(self) -> str:
        return "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"

    # Sizes and limits

    @property
    def info(self) -> PipelineInfo:
        return PipelineInfo(self.pipeline, self.latent_size)

    @property
    def network(self) -> Any:
        return self.info.network

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.info.latent_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        return self.info.image_size

    @property
    def tokenizer(self) -> Any:
        return self.info.tokenizer

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a prompt that are used."""
        return self.info.num_tokens

    @property
    def device(self) -> str:
        return str(next(self.network.parameters()).device)

    @property
    def precision(self) -> str:
        return str(next(self.network.parameters()).dtype).removeprefix("torch.")

    # Images and timings

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor) -> NDArray[np.uint8]:
        """Images [B, H, W, 3] from `noise` [B, C, h, w].

        The noise of an image also seeds the random numbers that the scheduler draws. Raises Failure
        if an image has NaN, as where a float16 network or VAE overflows.
        """
        latents = noise.to(self.network.dtype).to(self.device)
        if self.info.packed > 1:
            latents = pack(latents)

        images = self.pipeline(
            list(prompts),
            latents=latents,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            output_type="pt",
            generator=[_generator_from_noise(row) for row in noise],
            **self._size_arguments(),
            **self.call,
        ).images
        if images.isnan().any():
            remedy = "Its weights are damaged: compare them with the original."
            if self.precision != "float32":
                remedy = (
                    "The network or the VAE overflows in this precision, or the weights are "
                    "damaged: try --precision float32."
                )
            raise Failure(
                f"{self.name} generates images that are not numbers (NaN) in {self.precision}; "
                f"they are not kept. {remedy}"
            )
        return to_uint8(images * 2 - 1)

    def _size_arguments(self) -> dict[str, Any]:
        """The exact height and width in pixels.

        Sana's pipeline would otherwise choose the nearest size that it was trained at.
        """
        height, width = self.image_size
        arguments: dict[str, Any] = {"height": height, "width": width}
        if "use_resolution_binning" in inspect.signature(type(self.pipeline).__call__).parameters:
            arguments["use_resolution_binning"] = False
        return arguments

    def timings(
        self, prompts: Sequence[str], noise: Tensor, repeats: int = timing.REPEATS
    ) -> dict[str, Any]:
        """Measures the latency of single images and the throughput of a batch.

        `seconds_per_image` and `seconds_per_image_p90`: median and 90th percentile for single
        images. `images_per_second`: for all prompts in one batch. `peak_memory_bytes`: on a
        single image; left out if the operating system does not report it.

        `machine` and `measured_at` describe where and when. `other_load`: the share of the cores
        that other processes used meanwhile, if the operating system reports it.
        """

        def generate_one() -> object:
            return self.generate(prompts[:1], noise[:1])

        def generate_batch() -> object:
            return self.generate(prompts, noise)

        # Measure
        other_load = timing.OtherLoad()
        median, p90 = timing.median_and_p90(timing.latencies(generate_one, repeats, self.device))
        batch_seconds = timing.measure_seconds(generate_batch, self.device)
        load = other_load.share()
        memory = timing.peak_memory_bytes(generate_one, self.device)

        # Report
        report: dict[str, Any] = {
            "seconds_per_image": median,
            "seconds_per_image_p90": p90,
            "images_per_second": len(noise) / batch_seconds,
            "machine": timing.describe_machine(self.device),
            "measured_at": time.strftime("%Y-%m-%d %H:%M %Z"),
        }
        if load is not None:
            report["other_load"] = round(load, 3)
        if memory is not None:
            report["peak_memory_bytes"] = memory
        return report


def _generator_from_noise(noise: Tensor) -> torch.Generator:
    """A CPU generator seeded by one image's noise, so independent of batch, rank and device."""
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
    """Loads a system by name.

    `name`: `pocket-teacher`, `pocket-student`, a pipeline's folder or hub id, or a published
    system, NAME=FOLDER. A system that is published as weights is NAME=FOLDER+FILE: the pipeline it
    is based on, and the weights. One-step students and published systems have fixed settings, which
    replace the defaults.

    `resolution`, or FOLDER@512px, is the side of a teacher's images in pixels, the model's default
    if not given; a student has the resolution of its pairs.

    Raises UserError if the device is not available, the folder is not a supported pipeline, the
    published system is unknown, or a number of steps, guidance scale or size does not fit.
    """
    device = str(resolve_device(device, "give --device cpu"))

    # 1. Parse the name
    is_path = Path(name).expanduser().exists()
    label, equals, path = (name, "", "") if is_path else name.partition("=")
    folder = name
    if not is_path and (match := WITH_RESOLUTION.fullmatch(name)):
        folder = match[1]
        resolution = int(match[2])
    if not (equals or "/" in folder or folder in POCKET or Path(folder).expanduser().exists()):
        raise UserError(
            f"{folder} is not a folder{nearest(folder, POCKET)}. Or give a folder that "
            "`DiffusionPipeline.save_pretrained` wrote. Models of a hub must be downloaded first; "
            "this program does not download them."
        )

    # 2. Load the pipeline and its settings
    if equals and PUBLISHED_NAME.fullmatch(label):
        system = load_published(label, path, num_inference_steps, guidance_scale)
    else:
        system = load_pipeline_folder(folder, num_inference_steps, guidance_scale, resolution)

    # 3. Move it
    if (device, precision) != ("cpu", "float32"):
        system.pipeline.to(device, getattr(torch, precision))
    return system


def load_pipeline_folder(
    name: str, num_inference_steps: int | None, guidance_scale: float | None, resolution: int | None
) -> System:
    """A teacher or a one-step student by folder, hub id, `pocket-teacher` or `pocket-student`."""
    # 1. The pipeline
    if name == "pocket-student":
        folder = assets.folder("student")
        pipeline = _load_pocket_student()
    else:
        folder = assets.folder("teacher") if name == "pocket-teacher" else find_model(name)[0]
        pipeline = _load_runnable(folder)
    revision = sha256(folder)[:16]

    # 2. A one-step student has fixed settings
    if is_one_step(pipeline.scheduler):
        if num_inference_steps not in (None, 1) or (guidance_scale or 0) > 1:
            raise UserError(
                f"{name} is a one-step student: it runs with num_inference_steps=1 and "
                "guidance_scale=0"
            )
        system = System(name, pipeline, 1, 0.0, revision)
        return _with_latent_size(system, read_latent_size(folder))

    # 3. All others have default settings
    steps = assets.NUM_INFERENCE_STEPS if num_inference_steps is None else num_inference_steps
    guidance = assets.GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    if type(pipeline).__name__ not in FAMILIES:
        check_noise_schedule(pipeline, folder)
        pipeline.scheduler = ddim_scheduler(pipeline.scheduler.config)
        set_timesteps(pipeline.scheduler, steps, name)
        return System(name, pipeline, steps, guidance, revision)

    # 4. Teachers: DDIM, or Euler for flow models, with the guidance and size of their pairs
    with translated_errors(f"the pipeline in {folder}"):
        check_can_teach(pipeline, folder)
        teacher = Teacher(pipeline, folder.name, revision, resolution)
        check_resolution(teacher)
    if teacher.guidance == "none" and guidance_scale is None:
        guidance = 0.0
    teacher.uses_classifier_free_guidance(guidance)  # refuses guidance that is not possible
    teacher.steps(steps)  # refuses too many
    pipeline.scheduler = teacher.scheduler
    system = System(name, pipeline, steps, guidance, revision)
    return _with_latent_size(system, teacher.latent_shape[1:])


def load_published(
    name: str, path: str, num_inference_steps: int | None, guidance_scale: float | None
) -> System:
    """A published system from `path`: FOLDER, or FOLDER+FILE if it is published as weights."""
    # 1. Its settings
    if name in published.PICTURES_ONLY:
        raise UserError(f"{name}: {published.PICTURES_ONLY[name]}; it cannot generate new images")
    if name not in published.SYSTEMS:
        known = [*published.SYSTEMS, *published.PICTURES_ONLY]
        raise UserError(f"no published system is called {name!r}{nearest(name, known)}")
    row = published.SYSTEMS[name]

    # 2. Its files
    base, plus, file = _split_weights(path)
    if row.weights and not plus:
        raise UserError(
            f"{name}={path}: write it as {name}=FOLDER+FILE, its base pipeline and its weights"
        )
    if plus and not row.weights:
        raise UserError(f"{name}={path}: write it as {name}=FOLDER, its pipeline")
    weights = Path(file).expanduser() if plus else None

    # 3. Steps and guidance
    steps = published.choose_num_steps(name, num_inference_steps, weights)
    guidance = row.guidance_scale if guidance_scale is None else guidance_scale
    if row.guidance_scale == 0 and guidance > 1:
        raise UserError(f"{name} runs without guidance; leave out --guidance-scale {guidance:g}")

    # 4. The pipeline
    folder = find_model(base)[0]
    pipeline = _load_runnable(folder)
    check_noise_schedule(pipeline, folder)
    revision = sha256(folder)[:16]
    if weights is not None:
        published.load_weights(pipeline, weights)
        revision = hashlib.sha256(f"{revision}{sha256(weights)}".encode()).hexdigest()[:16]
    pipeline.scheduler = published.build_scheduler(row, pipeline.scheduler.config, steps)
    if row.any_steps:
        set_timesteps(pipeline.scheduler, steps, name)
    call = published.call_arguments(row, steps)
    return System(f"{name}={path}", pipeline, steps, guidance, revision, call)


def _split_weights(path: str) -> tuple[str, str, str]:
    """FOLDER+FILE → folder, +, file; the folder may contain a + if it exists."""
    parts = path.split("+")
    for i in range(len(parts), 0, -1):
        base = "+".join(parts[:i])
        if Path(base).expanduser().exists():
            rest = "+".join(parts[i:])
            return base, "+" if i < len(parts) else "", rest
    return path.partition("+")


def read_latent_size(folder: Path) -> tuple[int, int] | None:
    """Height and width of the latents that an exported student was trained on.

    Read from its diffusion2gan.json; None without that file.
    """
    path = folder / "diffusion2gan.json"
    if not path.is_file():
        return None
    _, height, width = read_json(path)["pairs"]["latent_shape"]
    return int(height), int(width)


def _with_latent_size(system: System, size: tuple[int, int] | None) -> System:
    """The system with latents of `size`; unchanged if that is its default already."""
    if size is None or size == system.latent_shape[1:]:
        return system
    return replace(system, latent_size=size)


def _load_runnable(folder: Path) -> DiffusionPipeline:
    """Loads a pipeline of a class that generates images from noise."""
    index = folder / "model_index.json"
    try:
        class_name = read_json(index).get("_class_name")
    except (OSError, UserError, AttributeError):
        class_name = None  # reported by check_pipeline_folder
    if class_name not in ALSO_RUNNABLE:
        check_pipeline_folder(folder)
    return load_pipeline(folder)


def _load_pocket_student() -> DiffusionPipeline:
    """The embedded student: its UNet and scheduler in the teacher's pipeline."""
    folder = assets.folder("student")
    pipeline = load_pipeline(assets.folder("teacher"))
    pipeline.unet = load_model(UNet2DConditionModel, folder / "unet").eval()
    pipeline.scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    return pipeline
