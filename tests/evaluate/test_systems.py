"""Systems: a folder, its stock pipeline and its settings; pictures that depend on prompt and noise alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.systems import load_system
from diffusion2gan.export import write_pipeline
from diffusion2gan.pairs.store import noise_of
from diffusion2gan.runtime.files import sha256
from diffusion2gan.teacher.pipeline import load_teacher

PROMPTS = ["a red ring", "a large blue star on pink", "a disc above a plain green heart", "a moon and a cross on sky"]


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
        assert (system.num_inference_steps, system.guidance_scale, system.note) == (1, 0.0, "1 step")


@pytest.mark.parametrize("settings", [(2, None), (50, 0.0), (None, 3.0), (1, 7.5)])
def test_a_one_step_student_refuses_other_settings(
    student: Path, settings: tuple[int | None, float | None]
) -> None:  # fmt: skip
    with pytest.raises(UserError, match="one-step student: it runs with num_inference_steps=1 and guidance_scale=0"):
        load_system(str(student), *settings)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_pictures_do_not_depend_on_the_batch(tiny_teacher: Path, student: Path, kind: str) -> None:
    system = load_system(str(tiny_teacher), 3) if kind == "teacher" else load_system(str(student))
    noise = noise_of([5, 6, 7, 8], system.latent_shape)
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
    noise = noise_of([9], system.latent_shape)
    stock = pipeline(PROMPTS[0], latents=noise, num_inference_steps=1, guidance_scale=0, output_type="np").images[0]
    ours = system.generate(PROMPTS[:1], noise)[0]
    assert np.abs(ours.astype(float) - np.round(stock * 255)).max() <= 1


def test_timings_are_positive_and_consistent(student: Path) -> None:
    system = load_system(str(student))
    told = system.timings(PROMPTS, noise_of([1, 2, 3, 4], system.latent_shape), repeats=2)
    assert {"seconds_per_image", "seconds_per_image_p90", "images_per_second"} <= set(told)
    assert told["seconds_per_image_p90"] >= told["seconds_per_image"]
    assert told.get("peak_memory_bytes", 2**27) >= 2**27  # the process holds torch and a pipeline
    assert 0 < told["seconds_per_image"] < 30 and 0 < told["images_per_second"] < 10_000


def test_folders_that_are_no_systems(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_system(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        load_system(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="is a FluxPipeline: flow models are not run here yet"):
        load_system(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="does not load"):
        load_system(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="does not name a pipeline class"):
        load_system(str(tmp_path))


def test_flow_models_are_refused(
    family_folder: Callable[[str], Path],
) -> None:
    for name, kind in (("sd3", "StableDiffusion3Pipeline"), ("flux_dev", "FluxPipeline"), ("sana", "SanaPipeline")):
        with pytest.raises(UserError, match=f"is a {kind}: flow models are not run here yet"):
            load_system(str(family_folder(name)))
