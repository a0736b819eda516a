"""Systems: a folder, its stock pipeline and its settings; pictures that depend on prompt and noise alone."""

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
    """A one-step folder with the teacher's weights, one layer of them moved."""
    teacher = load_teacher(str(tiny_teacher))
    weights = {key: value.clone() for key, value in teacher.pipeline.unet.state_dict().items()}
    weights["conv_out.bias"] += 0.3
    folder = tmp_path_factory.mktemp("student")
    write_pipeline(teacher, weights, folder, torch.float32)
    return folder


def test_a_teacher_runs_50_steps_by_default(tiny_teacher: Path) -> None:
    system = load_system(str(tiny_teacher))
    assert (system.num_inference_steps, system.guidance_scale, system.note) == (50, 3.0, "50 steps")
    assert system.latent_shape == (4, 16, 16) and system.name == str(tiny_teacher)
    assert system.revision == sha256(tiny_teacher)[:16]
    other = load_system(str(tiny_teacher), 4, 1.5)
    assert (other.num_inference_steps, other.guidance_scale) == (4, 1.5)
    assert load_system(str(tiny_teacher), guidance_scale=0.0).guidance_scale == 0


def test_a_key_names_all_that_pictures_depend_on(tiny_teacher: Path, student: Path) -> None:
    systems = [load_system(str(tiny_teacher), *args) for args in ((), (4,), (4, 1.5), (4, 2.0))]
    keys = {system.key for system in (*systems, load_system(str(student)))}
    assert len(keys) == 5


def test_a_one_step_student_knows_its_settings(student: Path) -> None:
    for settings in ((), (1,), (1, 0.0), (None, 1.0)):
        system = load_system(str(student), *settings)
        assert (system.num_inference_steps, system.guidance_scale, system.note) == (
            1,
            0.0,
            "1 step",
        )


@pytest.mark.parametrize("settings", [(2, None), (50, 0.0), (None, 3.0), (1, 7.5)])
def test_a_one_step_student_refuses_other_settings(
    student: Path, settings: tuple[int | None, float | None]
) -> None:
    with pytest.raises(
        UserError, match="one-step student: it runs with num_inference_steps=1 and guidance_scale=0"
    ):
        load_system(str(student), *settings)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_pictures_do_not_depend_on_the_batch(tiny_teacher: Path, student: Path, kind: str) -> None:
    system = load_system(str(tiny_teacher), 3) if kind == "teacher" else load_system(str(student))
    noise = noise_from_seeds([5, 6, 7, 8], system.latent_shape)
    together = system.generate(PROMPTS, noise)
    assert together.shape == (4, 64, 64, 3) and together.dtype == np.uint8
    for i in (0, 3):
        alone = system.generate(PROMPTS[i : i + 1], noise[i : i + 1])[0]
        assert np.abs(alone.astype(int) - together[i].astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 1
    turned = system.generate(PROMPTS, noise.flip(0))
    assert np.abs(turned.astype(int) - together.astype(int)).max() > 1  # the noise matters


def test_pictures_are_the_stock_pipelines(student: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(student, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    system = load_system(str(student))
    noise = noise_from_seeds([9], system.latent_shape)
    stock = pipeline(
        PROMPTS[0], latents=noise, num_inference_steps=1, guidance_scale=0, output_type="np"
    ).images[0]
    ours = system.generate(PROMPTS[:1], noise)[0]
    assert np.abs(ours.astype(float) - np.round(stock * 255)).max() <= 1


def test_timings_are_positive_and_consistent(student: Path) -> None:
    system = load_system(str(student))
    told = system.timings(PROMPTS, noise_from_seeds([1, 2, 3, 4], system.latent_shape), repeats=2)
    assert {"seconds_per_image", "seconds_per_image_p90", "images_per_second"} <= set(told)
    assert told["seconds_per_image_p90"] >= told["seconds_per_image"]
    assert told.get("peak_memory_bytes", 2**27) >= 2**27  # the process holds torch and a pipeline
    assert told["seconds_per_image"] > 0 and told["images_per_second"] > 0


def test_folders_that_are_no_systems(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_system(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        load_system(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match="is a KandinskyPipeline, which is not supported"):
        load_system(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"})
    )
    with pytest.raises(UserError, match="does not load"):
        load_system(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="does not name a pipeline class"):
        load_system(str(tmp_path))


FLOWS = ("sd3", "sd3_without_t5", "flux_dev", "flux_schnell", "sana")


def by_hand(folder: Path, noise: Tensor, size: int, scheduler: Any, **options: Any) -> Tensor:
    """The stock pipeline's pictures [B, H, W, 3] in 0 … 255, written out without this package."""
    without = {"text_encoder_3": None, "tokenizer_3": None} if "without" in folder.name else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **without)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler or pipeline.scheduler
    if type(pipeline).__name__ == "FluxPipeline":
        noise = pipeline._pack_latents(noise, len(noise), 16, SIZE, SIZE)
    options |= (
        {"use_resolution_binning": False} if type(pipeline).__name__ == "SanaPipeline" else {}
    )
    made = pipeline(
        PROMPTS[:2], latents=noise, height=size, width=size, output_type="pt", **options
    ).images
    return (made * 255).round().permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_teachers_are_their_stock_pipelines(
    name: str, family_folder: Callable[[str], Path]
) -> None:
    folder, size = family_folder(name), RESOLUTION[name]
    system = load_system(f"{folder}@{size}px", 3)
    assert system.latent_shape[1:] == (SIZE, SIZE) and system.pixels == (size, size)
    guidance = 0.0 if name == "flux_schnell" else 3.0
    read = {"sd3": 256, "sd3_without_t5": 77, "sana": 300}.get(name, 512)
    assert (system.guidance_scale, system.num_tokens) == (guidance, read)
    noise = noise_from_seeds([5, 6], system.latent_shape)
    made = system.generate(PROMPTS[:2], noise)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if name == "sana" else None
    stock = by_hand(folder, noise, size, scheduler, num_inference_steps=3, guidance_scale=guidance)
    assert np.abs(made.astype(float) - stock.numpy()).max() <= 1
    again = load_system(str(folder), 3, resolution=size)
    assert (
        again.key == system.key
        and again.key != load_system(str(folder), 3, resolution=2 * size).key
    )


@pytest.mark.parametrize("name", FLOWS)
def test_flow_students_know_their_settings_and_size(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
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
    assert (system.num_inference_steps, system.guidance_scale, system.latent_shape) == (
        1,
        0.0,
        teacher.latent_shape,
    )
    noise = noise_from_seeds([5, 6], system.latent_shape)
    stock = by_hand(student, noise, size, None, num_inference_steps=1, guidance_scale=0)
    made = system.generate(PROMPTS[:2], noise)
    assert np.abs(made.astype(float) - stock.numpy()).max() <= 1
    untrained = load_system(str(folder), 1, 0.0, resolution=size).generate(PROMPTS[:2], noise)
    assert np.abs(made.astype(int) - untrained).max() > 1
    with pytest.raises(UserError, match="one-step student"):
        load_system(str(student), 2)


def test_flow_systems_in_every_job(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """`generate`, `compare`, `serve` and `evaluate`, each with a flow teacher."""
    from diffusion2gan.compare.compare import compare
    from diffusion2gan.compare.images import parse_systems
    from diffusion2gan.evaluate.run import evaluate
    from diffusion2gan.generate import generate
    from diffusion2gan.serve.generation import SharedSystem

    system = load_system(f"{family_folder('flux_schnell')}@64px", 1)
    generate(system, ["a star"], 0, 2, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()
    named = parse_systems(
        [f"sd3={family_folder('sd3')}@64px@1", f"sana={family_folder('sana')}@256px@1"]
    )
    assert [(s.num_inference_steps, s.pixels) for s in named.values()] == [
        (1, (64, 64)),
        (1, (256, 256)),
    ]
    compare(named, ["a star", "two rings"], tmp_path / "report", seed=255)
    assert "a star" in (tmp_path / "report" / "index.html").read_text("utf-8")
    shared = SharedSystem(named["sd3"])
    images, _ = shared.generate("a star", noise_from_seeds([1], named["sd3"].latent_shape))
    assert images[0].size == (64, 64)
    assert shared.truncation_note("star " * 300).startswith("only the first 256 of")
    metrics = evaluate(
        f"{family_folder('sd3')}@64px",
        count=4,
        seed=0,
        cache=tmp_path / "cache",
        num_inference_steps=1,
        num_resamples=0,
    )
    assert (
        metrics["scheduler"] == "FlowMatchEulerDiscreteScheduler"
        and metrics["frechet_distance"] > 0
    )


def test_a_flow_that_knows_no_guidance_refuses_one(family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="distilled without guidance"):
        load_system(str(family_folder("flux_schnell")), guidance_scale=3.0)
    with pytest.raises(UserError, match=r"resolution 65: .* makes pictures in steps of 16 pixels"):
        load_system(f"{family_folder('flux_dev')}@65px")
