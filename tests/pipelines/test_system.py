"""Systems: their settings, and images that depend on prompt and noise alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_families import RESOLUTION, SIZE
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.export import write_pipeline
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.runtime.files import sha256
from diffusion2gan.teacher.loading import load_teacher

PROMPTS = [
    "a red ring",
    "a large blue star on pink",
    "a disc above a plain green heart",
    "a moon and a cross on sky",
]


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step pipeline with the teacher's weights, one layer of them changed."""
    teacher = load_teacher(str(tiny_teacher))
    weights = {key: value.clone() for key, value in teacher.pipeline.unet.state_dict().items()}
    weights["conv_out.bias"] += 0.3
    folder = tmp_path_factory.mktemp("student")
    write_pipeline(teacher, weights, folder, torch.float32)
    return folder


def test_teacher_runs_50_steps_by_default(tiny_teacher: Path) -> None:
    system = load_system(str(tiny_teacher))
    assert (system.num_inference_steps, system.guidance_scale, system.note) == (50, 3.0, "50 steps")
    assert system.name == str(tiny_teacher)
    assert system.latent_shape == (4, 16, 16)
    assert system.revision == sha256(tiny_teacher)[:16]

    other = load_system(str(tiny_teacher), 4, 1.5)
    assert (other.num_inference_steps, other.guidance_scale) == (4, 1.5)
    assert load_system(str(tiny_teacher), guidance_scale=0.0).guidance_scale == 0


def test_key_depends_on_weights_and_settings(tiny_teacher: Path, student: Path) -> None:
    systems = [
        load_system(str(student)),
        load_system(str(tiny_teacher)),
        load_system(str(tiny_teacher), 4),
        load_system(str(tiny_teacher), 4, 1.5),
        load_system(str(tiny_teacher), 4, 2.0),
        load_system(str(tiny_teacher), precision="bfloat16"),
        load_system(str(tiny_teacher), resolution=32),
    ]
    assert len({system.key for system in systems}) == len(systems)
    assert load_system(str(tiny_teacher), 4, 2).key == systems[4].key
    assert load_system(str(tiny_teacher), resolution=64).key == systems[1].key  # the default


def test_system_has_the_sizes_and_limits_of_its_teacher(
    family_folder: Callable[[str], Path],
) -> None:
    for name in ("sd15", "sdxl", "flux_dev", "sana"):
        folder, size = family_folder(name), RESOLUTION[name]
        system = load_system(str(folder), resolution=size)
        teacher = load_teacher(str(folder), resolution=size)
        assert system.latent_shape == teacher.latent_shape
        assert system.image_size == teacher.image_size == (size, size)
        assert system.num_tokens == teacher.num_tokens
        assert type(system.tokenizer) is type(teacher.tokenizer)


def test_one_step_student_has_fixed_settings(student: Path) -> None:
    for settings in ((), (1,), (1, 0.0), (None, 1.0)):
        system = load_system(str(student), *settings)
        assert (system.num_inference_steps, system.guidance_scale) == (1, 0.0)
        assert system.note == "1 step"


@pytest.mark.parametrize("settings", [(2, None), (50, 0.0), (None, 3.0), (1, 7.5)])
def test_one_step_student_refuses_other_settings(
    student: Path, settings: tuple[int | None, float | None]
) -> None:
    message = "one-step student: it runs with num_inference_steps=1 and guidance_scale=0"
    with pytest.raises(UserError, match=message):
        load_system(str(student), *settings)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_images_do_not_depend_on_the_batch(tiny_teacher: Path, student: Path, kind: str) -> None:
    system = load_system(str(tiny_teacher), 3) if kind == "teacher" else load_system(str(student))
    noise = noise_from_seeds([5, 6, 7, 8], system.latent_shape)
    batch = system.generate(PROMPTS, noise)
    assert batch.shape == (4, 64, 64, 3) and batch.dtype == np.uint8
    for i in (0, 3):
        single = system.generate(PROMPTS[i : i + 1], noise[i : i + 1])[0]
        assert np.abs(single.astype(int) - batch[i].astype(int)).max() <= 1

    # Prompt and noise have an effect
    assert np.abs(batch[0].astype(int) - batch[1].astype(int)).max() > 1
    flipped = system.generate(PROMPTS, noise.flip(0))
    assert np.abs(flipped.astype(int) - batch.astype(int)).max() > 1


def test_images_match_the_stock_pipeline(student: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(student, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    system = load_system(str(student))
    noise = noise_from_seeds([9], system.latent_shape)
    stock = pipeline(
        PROMPTS[0], latents=noise, num_inference_steps=1, guidance_scale=0, output_type="np"
    ).images[0]
    found = system.generate(PROMPTS[:1], noise)[0]
    assert np.abs(found.astype(float) - np.round(stock * 255)).max() <= 1


def test_timings_are_positive_and_consistent(student: Path) -> None:
    system = load_system(str(student))
    noise = noise_from_seeds([1, 2, 3, 4], system.latent_shape)
    report = system.timings(PROMPTS, noise, repeats=2)
    assert {"seconds_per_image", "seconds_per_image_p90", "images_per_second"} <= set(report)
    assert report["seconds_per_image_p90"] >= report["seconds_per_image"]
    assert report["seconds_per_image"] > 0 and report["images_per_second"] > 0
    # The process contains torch and a pipeline
    assert report.get("peak_memory_bytes", 2**27) >= 2**27


def test_folder_without_a_supported_pipeline_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_system(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        load_system(str(tmp_path))

    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(UserError, match="is a KandinskyPipeline, which is not supported"):
        load_system(str(tmp_path))
    index.write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="does not load"):
        load_system(str(tmp_path))
    index.write_text("{")
    with pytest.raises(UserError, match="does not name a pipeline class"):
        load_system(str(tmp_path))


FLOWS = ("sd3", "sd3_without_t5", "flux_dev", "flux_schnell", "sana")


def stock_images(folder: Path, noise: Tensor, size: int, scheduler: Any, **options: Any) -> Tensor:
    """The stock pipeline's images [B, H, W, 3] in 0 … 255, made without this package."""
    absent: dict[str, None] = {}
    if "without" in folder.name:
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler or pipeline.scheduler

    kind = type(pipeline).__name__
    if kind == "FluxPipeline":
        noise = pipeline._pack_latents(noise, len(noise), 16, SIZE, SIZE)
    if kind == "SanaPipeline":
        options["use_resolution_binning"] = False
    images = pipeline(
        PROMPTS[:2], latents=noise, height=size, width=size, output_type="pt", **options
    ).images
    return (images * 255).round().permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_teachers_match_their_stock_pipelines(
    name: str, family_folder: Callable[[str], Path]
) -> None:
    folder, size = family_folder(name), RESOLUTION[name]
    system = load_system(f"{folder}@{size}px", 3)
    assert system.latent_shape[1:] == (SIZE, SIZE) and system.image_size == (size, size)
    guidance = 0.0 if name == "flux_schnell" else 3.0
    num_tokens = {"sd3": 256, "sd3_without_t5": 77, "sana": 300}.get(name, 512)
    assert (system.guidance_scale, system.num_tokens) == (guidance, num_tokens)

    # The same images
    noise = noise_from_seeds([5, 6], system.latent_shape)
    found = system.generate(PROMPTS[:2], noise)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if name == "sana" else None
    stock = stock_images(
        folder, noise, size, scheduler, num_inference_steps=3, guidance_scale=guidance
    )
    assert np.abs(found.astype(float) - stock.numpy()).max() <= 1

    # The key depends on the resolution, however it is given
    assert load_system(str(folder), 3, resolution=size).key == system.key
    assert load_system(str(folder), 3, resolution=2 * size).key != system.key


@pytest.mark.parametrize("name", FLOWS)
def test_flow_students_have_fixed_settings_and_the_size_of_their_pairs(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    # An exported student
    folder, size = family_folder(name), RESOLUTION[name]
    teacher = load_teacher(str(folder), resolution=size)
    weights = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    weights["proj_out.bias"] += 0.3
    student = tmp_path / ("without" if "without" in name else "student")
    write_pipeline(teacher, weights, student, torch.float32)
    (student / "diffusion2gan.json").write_text(
        json.dumps({"pairs": {"latent_shape": list(teacher.latent_shape)}})
    )

    system = load_system(str(student))
    assert (system.num_inference_steps, system.guidance_scale) == (1, 0.0)
    assert system.latent_shape == teacher.latent_shape

    # Its images are the stock pipeline's, and not the teacher's
    noise = noise_from_seeds([5, 6], system.latent_shape)
    stock = stock_images(student, noise, size, None, num_inference_steps=1, guidance_scale=0)
    found = system.generate(PROMPTS[:2], noise)
    assert np.abs(found.astype(float) - stock.numpy()).max() <= 1
    untrained = load_system(str(folder), 1, 0.0, resolution=size).generate(PROMPTS[:2], noise)
    assert np.abs(found.astype(int) - untrained).max() > 1

    with pytest.raises(UserError, match="one-step student"):
        load_system(str(student), 2)


def test_flow_systems_work_in_every_command(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """`generate`, `compare`, `serve` and `evaluate`, each with a flow teacher."""
    from diffusion2gan.compare.compare import compare
    from diffusion2gan.compare.images import parse_systems
    from diffusion2gan.evaluate.run import evaluate
    from diffusion2gan.evaluate.settings import EvaluateSettings
    from diffusion2gan.generate import generate
    from diffusion2gan.serve.generation import SharedSystem

    # generate
    system = load_system(f"{family_folder('flux_schnell')}@64px", 1)
    generate(system, ["a star"], 0, 2, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()

    # compare
    named = parse_systems(
        [f"sd3={family_folder('sd3')}@64px@1", f"sana={family_folder('sana')}@256px@1"]
    )
    assert [(s.num_inference_steps, s.image_size) for s in named.values()] == [
        (1, (64, 64)),
        (1, (256, 256)),
    ]
    compare(named, ["a star", "two rings"], tmp_path / "report", seed=255)
    assert "a star" in (tmp_path / "report" / "index.html").read_text("utf-8")

    # serve
    shared = SharedSystem(named["sd3"])
    images, _ = shared.generate("a star", noise_from_seeds([1], named["sd3"].latent_shape))
    assert images[0].size == (64, 64)
    assert shared.truncation_note("star " * 300).startswith("only the first 256 of")

    # evaluate
    settings = EvaluateSettings(
        system=f"{family_folder('sd3')}@64px",
        cache=tmp_path / "cache",
        num_inference_steps=1,
        num_resamples=0,
        count=4,
    )
    metrics = evaluate(settings)
    assert metrics["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert metrics["frechet_distance"] > 0


def test_flow_without_guidance_refuses_it(family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="distilled without guidance"):
        load_system(str(family_folder("flux_schnell")), guidance_scale=3.0)


def test_resolution_that_does_not_fit_is_reported(family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"resolution 65 does not fit .* multiple of 16 pixels"):
        load_system(f"{family_folder('flux_dev')}@65px")
