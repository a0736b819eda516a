"""`compare`: images generated once and stored, shared noise, systems and metrics by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion2gan.cli import app
from diffusion2gan.compare import compare as job
from diffusion2gan.compare.images import generate_images, parse_system, parse_systems
from diffusion2gan.compare.report import data_uri
from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pipelines.system import System

PROMPTS = [f"a {colour} ring" for colour in ("red", "blue", "green", "cyan", "pink", "grey")] * 3


@pytest.fixture(scope="module")
def systems() -> dict[str, System]:
    return parse_systems(["student=pocket-student", "teacher=pocket-teacher@1"])


def test_a_suffix_sets_the_number_of_steps() -> None:
    system = parse_system("pocket-teacher@3")
    assert system.num_inference_steps == 3
    assert system.note == "3 steps"
    with pytest.raises(UserError, match="is a one-step student"):
        parse_system("pocket-student@3")


def test_every_image_has_its_prompt_and_noise(systems: dict[str, System], tmp_path: Path) -> None:
    images = generate_images(systems, PROMPTS, 255, tmp_path)
    for name, system in systems.items():
        assert len(images[name]) == len(PROMPTS)
        for i in (0, 15, 16, 17):  # both sides of a boundary between batches
            noise = noise_from_seeds([pair_seed(255, i)], system.latent_shape)
            (expected,) = system.generate([PROMPTS[i]], noise)
            difference = np.asarray(images[name][i]).astype(int) - expected
            assert np.abs(difference).max() <= 1


def test_finished_images_are_stored_and_not_generated_again(
    systems: dict[str, System], tmp_path: Path
) -> None:
    first = generate_images(systems, PROMPTS, 3, tmp_path)
    files = sorted(path for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == 4

    # As if the run had been interrupted: only the missing batch is generated
    files[0].unlink()
    times = {path: os.stat(path).st_mtime_ns for path in files[1:]}
    again = generate_images(systems, PROMPTS, 3, tmp_path)
    assert {path: os.stat(path).st_mtime_ns for path in files[1:]} == times
    assert files[0].exists()
    for name in first:
        for before, after in zip(first[name], again[name], strict=True):
            assert np.array_equal(before, after)

    # Other prompts are stored in other files
    reversed_prompts = generate_images(systems, PROMPTS[::-1], 3, tmp_path)
    assert not np.array_equal(reversed_prompts["student"][0], first["student"][0])


def test_the_report_has_the_given_metrics(systems: dict[str, System], tmp_path: Path) -> None:
    metrics = {
        "student": {
            "frechet_distance": 2.5,
            "intervals": {"frechet_distance": [2.0, 3.0]},
            "protocol_settings": {"count": 9},
            "protocol_sha256": "9",
        }
    }
    job.compare(systems, PROMPTS[:2], tmp_path, seed=1, metrics=metrics)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 2.5 (2 to 3) | – |" in text
    assert "noise: the same for every system in a row" in text

    # Metrics of another protocol are refused
    metrics["teacher"] = {
        "frechet_distance": 1.0,
        "protocol_settings": {"count": 10},
        "protocol_sha256": "10",
    }
    with pytest.raises(UserError, match="count is 9 for student and 10 for teacher"):
        job.compare(systems, PROMPTS[:2], tmp_path, seed=1, metrics=metrics)


def test_metrics_are_read_by_system_name(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"clip_score": 0.3}))
    assert job.read_metrics({"a": str(path)}, ["a", "b"]) == {"a": {"clip_score": 0.3}}


def test_mistakes_are_refused_before_anything_is_generated(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give the name of a folder"):
        job.compare({}, PROMPTS, tmp_path / "file", seed=1)

    path = tmp_path / "m.json"
    for content in ([1], {"systems": {"teacher": {"frechet_distance": 1.0}}}):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="does not contain the metrics of one system"):
            job.read_metrics({"a": str(path)}, ["a"])

    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"device '{device}' is not available .*--device cpu"):
            parse_system("pocket-student", device)


def run_compare(tmp_path: Path, *systems: str) -> None:
    """`diffusion2gan compare` on `prompts.txt`, with the report in `report`."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    argv = ["compare", "--prompts", str(tmp_path / "prompts.txt")]
    argv += ["--out", str(tmp_path / "report")]
    for system in systems:
        argv += ["--system", system]
    app(argv)


def write_images(folder: Path) -> list[Image.Image]:
    """A folder with a random image per prompt: gigagan_0.png, …"""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = []
    for i in range(len(PROMPTS)):
        image = Image.fromarray(rng.integers(0, 255, (48, 40, 3), np.uint8))
        image.save(folder / f"gigagan_{i}.png")
        images.append(image)
    return images


def test_a_folder_of_images_is_a_column_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "gigagan"
    images = write_images(folder)
    with pytest.raises(SystemExit) as exit_:
        run_compare(tmp_path, "student=pocket-student", f"gigagan={folder}")
    assert exit_.value.code == 0

    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert page.index(data_uri(images[0])) < page.index(data_uri(images[17]))
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "gigagan: 18 png images, used as they are" in text


def test_an_incomplete_damaged_or_empty_folder_of_images_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "gigagan"
    write_images(folder)
    last = folder / "gigagan_17.png"
    last.rename(folder / "gigagan_18.png")
    with pytest.raises(
        UserError, match=r"no image for caption 17\. .* has 18 images, and 18 are needed"
    ):
        run_compare(tmp_path, f"gigagan={folder}")
    (folder / "gigagan_18.png").rename(last)

    damaged = folder / "gigagan_3.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.raises(UserError, match=r"gigagan_3\.png cannot be read as an image"):
        run_compare(tmp_path, f"gigagan={folder}")

    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="gigagan contains no images"):
        run_compare(tmp_path, f"gigagan={folder}")


def test_a_published_system_can_be_compared(sd_style_teacher: Path) -> None:
    (system,) = parse_systems([f"sd=sd15={sd_style_teacher}@2"]).values()
    assert isinstance(system, System)
    assert (system.num_inference_steps, system.guidance_scale) == (2, 3.0)
    with pytest.raises(
        UserError, match="no published system is called 'sd16'; did you mean 'sd15'"
    ):
        parse_systems([f"sd=sd16={sd_style_teacher}"])
