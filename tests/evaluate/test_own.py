"""The protocol `own`: any prompts, sizes and feature networks; a teacher and real images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.runner import assert_refused, run
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from diffusion2gan.compare.compare import read_metrics
from diffusion2gan.compare.table import Column, metric_rows
from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import own
from diffusion2gan.evaluate.features import load_probe, probe_features
from diffusion2gan.evaluate.metrics import frechet_distance, kernel_distance
from diffusion2gan.evaluate.protocols import check_same_protocol
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings

NUM_PROMPTS = 12
SIDE = 80


def write_images(folder: Path, count: int, size: tuple[int, int], seed: int) -> Path:
    """Random coloured blocks; [height, width] pixels."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(count):
        blocks = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        blocks.resize(size[::-1], Image.Resampling.NEAREST).save(folder / f"{index:06d}.png")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"caption": f"picture number {i}"}) for i in range(NUM_PROMPTS)]
    path.write_text("\n".join(lines))
    return path


def settings(system: Path, prompts: Path, cache: Path, **options: Any) -> EvaluateSettings:
    options.setdefault("num_resamples", 20)
    return EvaluateSettings(str(system), cache, prompts=prompts, device="cpu", **options)


def read_probe_features(folder: Path, side: int) -> Any:
    """Of the centre squares of a folder's images, in the order of their names."""
    images = []
    for path in sorted(folder.iterdir()):
        image = Image.open(path)
        width, height = image.size
        square = min(width, height)
        left, top = (width - square) // 2, (height - square) // 2
        image = image.crop((left, top, left + square, top + square))
        if square != side:
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        images.append(np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)))
    return probe_features(load_probe(), np.stack(images))


def test_images_are_measured_against_the_teachers_and_real_ones_of_any_size(
    prompts: Path, tmp_path: Path
) -> None:
    system = write_images(tmp_path / "system", NUM_PROMPTS, (SIDE, SIDE), 0)
    teacher = write_images(tmp_path / "teacher", NUM_PROMPTS, (SIDE, 96), 1)
    real = write_images(tmp_path / "real", 9, (120, 100), 2)
    result = evaluate(
        settings(system, prompts, tmp_path / "cache", teacher=str(teacher), reference=real)
    )
    assert result["protocol"] == "own"
    assert result["features"] == "probe"
    assert (result["count"], result["reference_count"]) == (NUM_PROMPTS, 9)
    assert result["protocol_settings"]["side"] == SIDE
    assert list(result["protocol_settings"]["feature_weights"]) == ["probe"]
    assert "clip_score" not in result

    # The same numbers from the files
    a, b, c = (read_probe_features(folder, SIDE) for folder in (system, teacher, real))
    assert result["frechet_distance_to_teacher"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert result["frechet_distance"] == pytest.approx(frechet_distance(a, c), rel=1e-4)
    assert result["kernel_distance"] == pytest.approx(kernel_distance(a, c), rel=1e-4)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert result["same_noise_distance"] == pytest.approx(1 - cosine.mean(), rel=1e-4)
    for name in ("frechet_distance", "kernel_distance", "recall", "coverage_to_teacher"):
        low, high = result["intervals"][name]
        assert low <= result[name] <= high

    # In the report's table
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(result))
    read = read_metrics({"mine": str(path)}, ["mine"])
    titles = [metric.title for metric, _ in metric_rows([Column("mine", [], read["mine"])])]
    assert {"Fréchet distance", "Fréchet distance to the teacher", "Recall"} <= set(titles)


def test_teachers_images_of_a_prompt_are_resampled_with_the_systems(
    prompts: Path, tmp_path: Path
) -> None:
    """Every distance of a system to itself is 0, in every resample."""
    system = write_images(tmp_path / "system", NUM_PROMPTS, (SIDE, SIDE), 0)
    result = evaluate(settings(system, prompts, tmp_path / "cache", teacher=str(system)))
    assert result["frechet_distance_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert result["intervals"]["frechet_distance_to_teacher"] == pytest.approx([0, 0], abs=1e-6)
    assert result["same_noise_distance"] == pytest.approx(0, abs=1e-6)
    assert result["precision_to_teacher"] == result["coverage_to_teacher"] == 1

    # Metrics to another teacher are not put beside these
    other = write_images(tmp_path / "other", NUM_PROMPTS, (SIDE, SIDE), 5)
    to_other = evaluate(settings(system, prompts, tmp_path / "cache", teacher=str(other)))
    with pytest.raises(UserError, match="measured to different teachers"):
        check_same_protocol({"a": result, "b": to_other})


def write_dinov2(folder: Path) -> Path:
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    Dinov2Model(config).save_pretrained(folder)
    preprocessing = {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "resample": 3,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def test_student_is_measured_beside_its_teacher_with_the_guidance_of_its_pairs(
    family_folder: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    teacher = family_folder("sd15")
    student = Path(shutil.copytree(teacher, tmp_path / "student"))
    pairs = {"latent_shape": [4, 8, 8], "guidance_scale": 1.5}
    (student / "diffusion2gan.json").write_text(json.dumps({"pairs": pairs}))
    out = tmp_path / "metrics.json"
    result = run(
        *("evaluate", student, "--prompts", prompts, "--teacher", teacher, "--count", 6),
        *("--dinov2", write_dinov2(tmp_path / "dinov2"), "--num-noises", 2, "--num-resamples", 9),
        *("--num-inference-steps", 1, "--batch-size", 6, "--out", out),
    )
    assert result.code == 0, result
    assert "6 prompts" not in result.err and "12 prompts" in " ".join(result.err.split())
    assert "features of dinov2" in result.err and "clip_score and cmmd are not" in result.err

    metrics = json.loads(out.read_text())
    assert metrics["teacher_guidance_scale"] == 1.5
    assert metrics["teacher_num_inference_steps"] == 50
    assert metrics["features"] == "dinov2" and metrics["count"] == 6
    assert metrics["same_noise_distance"] > 0 and metrics["diversity"] > 0
    assert metrics["seconds_per_image"] > 0
    assert metrics["protocol_settings"]["side"] == 64


def random_textures(count: int, seed: int) -> Any:
    """[count, 128, 128, 3] uint8: coloured noise with the spectrum of photographs, 1/f."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.normal(size=(count, 3, 128, 128))) / frequency
    fields = np.fft.ifft2(spectrum).real
    fields /= fields.std((2, 3), keepdims=True)
    return (127.5 + 50 * fields).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def test_probe_tells_blurred_noisy_and_tinted_pictures_from_others() -> None:
    """Of pictures that are no drawn scenes: the more they are changed, the larger the distance."""
    extract = own.probe_space().extract
    real = extract(random_textures(160, 0))
    images = random_textures(160, 1)
    unchanged = frechet_distance(extract(images), real)

    def blur(pixels: int) -> Any:
        small = [Image.fromarray(image).reduce(pixels) for image in images]
        return np.stack([np.asarray(image.resize((128, 128))) for image in small])

    noise = np.random.default_rng(2).normal(size=images.shape)
    tint = np.array([1, -1, 1])
    for changed in (
        (blur(4), blur(8)),
        [(images + sigma * noise).clip(0, 255).astype(np.uint8) for sigma in (30, 80)],
        [(images + shift * tint).clip(0, 255).astype(np.uint8) for shift in (20, 50)],
    ):
        weak, strong = (frechet_distance(extract(one), real) for one in changed)
        assert 1.2 * unchanged < weak < strong


def test_what_the_protocol_lacks_is_refused(prompts: Path, tmp_path: Path) -> None:
    system = write_images(tmp_path / "system", 3, (SIDE, SIDE), 0)
    evaluate_command = ("evaluate", system, "--out", tmp_path / "m.json", "--device", "cpu")
    refused = run(*evaluate_command, "--prompts", prompts, "--count", 13)
    assert_refused(refused, 2, "has 12 prompts, and 13 are needed")
    refused = run(*evaluate_command, "--protocol", "own")
    assert_refused(refused, 2, "--protocol own needs --prompts FILE")
    refused = run(*evaluate_command, "--prompts", prompts, "--captions", prompts)
    assert_refused(refused, 2, "--protocol own does not use --captions")
    refused = run(*evaluate_command, "--prompts", prompts, "--protocol", "pocket")
    assert_refused(refused, 2, "--protocol pocket does not use --prompts")
    refused = run(*evaluate_command, "--prompts", prompts)
    assert_refused(refused, 2, "has no image for caption 3")
    assert not (tmp_path / "m.json").exists()


def test_frechet_distances_of_many_dimensions_are_resampled_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []

    def bootstrap(statistic: Any, count: int, *, num_resamples: int, point: float) -> Any:
        counts.append(num_resamples)
        return point, point

    monkeypatch.setattr(own.intervals, "bootstrap", bootstrap)
    for dimension in (128, 768, 1100):
        features = np.random.default_rng(0).normal(size=(4, dimension))
        own.frechet_metric("frechet_distance", features, features, True, 1000)
    assert counts == [200, 100, own.FEWEST_FRECHET_RESAMPLES]
