"""The weights inside the package: complete, small, and about as good as documented.

The tests use fewer images than docs/results, so their limits are loose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate.machine_keys import MACHINE_KEYS
from torch import from_numpy

from diffusion2gan import assets
from diffusion2gan.evaluate import pocket
from diffusion2gan.evaluate.features import PocketClip, load_probe, probe_features, score_attributes
from diffusion2gan.evaluate.images import ImageSet
from diffusion2gan.evaluate.metrics import accuracy, clip_score
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD, iterate_pocket_images, real_images
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.pipelines.system import System, load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime import checkpoint


def collect(image_set: ImageSet) -> np.ndarray:
    """[N, 64, 64, 3]: all images of a set."""
    return np.concatenate([images for (images,) in iterate_pocket_images([image_set])])


def attribute_accuracy(images: np.ndarray, prompts: list[str]) -> float:
    answers = score_attributes(load_probe(), images, prompts)
    return accuracy([answer for kind in answers.values() for answer in kind])


def test_all_weights_exist_and_are_small() -> None:
    pairs_bytes = other_bytes = 0
    suffixes = set()
    for path in assets.ROOT.rglob("*"):
        if path.is_file():
            suffixes.add(path.suffix)
            if path.parent.name == "pairs":
                pairs_bytes += path.stat().st_size
            else:
                other_bytes += path.stat().st_size
    assert other_bytes <= 30e6 and pairs_bytes <= 10e6
    assert not suffixes & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}  # only safetensors
    for name in ("teacher", "student", "clip", "probe", "latent_vgg"):
        assert assets.folder(name).is_dir()


def test_probe_recognises_attributes_of_real_images() -> None:
    prompts = scenes.captions(range(400), HELD_OUT_WORLD + 5)
    images = real_images(400, seed=5)
    answers = score_attributes(load_probe(), images, prompts)
    num_objects = sum(scenes.parse_caption(prompt).count for prompt in prompts)
    assert len(answers["count"]) == 400 and len(answers["shape"]) == num_objects

    assert attribute_accuracy(images, prompts) >= 0.97
    assert attribute_accuracy(np.roll(images, 1, axis=0), prompts) <= 0.6  # other captions


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("pocket-teacher", 0.90), ("pocket-student", 0.80)])
def test_shipped_systems_reach_their_attribute_accuracy(
    name: str, least: float, tmp_path: Path
) -> None:
    """docs/results has 1 000 captions; the accuracy on 256 others has a standard error of 0.01."""
    prompts = scenes.captions(range(256), HELD_OUT_WORLD + 3)
    images = collect(ImageSet(load_system(name), prompts, 3, tmp_path))
    assert len(images) == 256
    assert attribute_accuracy(images, prompts) >= least


def test_clip_matches_images_with_their_captions() -> None:
    clip = PocketClip()
    prompts = scenes.captions(range(64), HELD_OUT_WORLD + 6)
    embeds = clip.encode_images(real_images(64, seed=6)).image_embeds
    texts = clip.encode_texts(prompts)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)

    assert clip_score(embeds, texts) > clip_score(embeds, np.roll(texts, 1, axis=0)) + 0.1
    is_nearest = (embeds @ texts.T).argmax(1) == np.arange(64)
    assert is_nearest.mean() > 0.5


@pytest.mark.slow
def test_evaluate_distinguishes_teacher_student_and_one_step_teacher(tmp_path: Path) -> None:
    def measure(system: str, steps: int | None = None) -> dict[str, Any]:
        settings = EvaluateSettings(system, tmp_path, seed=3, num_inference_steps=steps, count=64)
        return evaluate(settings)

    teacher = measure("pocket-teacher")
    student = measure("pocket-student")
    one_step = measure("pocket-teacher", steps=1)
    assert set(teacher) == set(student) == set(one_step)

    assert teacher["same_noise_distance"] == pytest.approx(0, abs=1e-6)
    assert 0 < student["same_noise_distance"] < one_step["same_noise_distance"]
    assert teacher["frechet_distance"] < one_step["frechet_distance"]
    assert student["frechet_distance"] < one_step["frechet_distance"]
    assert teacher["attribute_accuracy"] > one_step["attribute_accuracy"] + 0.3
    assert student["attribute_accuracy"] > one_step["attribute_accuracy"] + 0.2
    assert student["num_inference_steps"] == 1 and teacher["num_inference_steps"] == 50


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_generated_images_are_cached_and_reused(tmp_path: Path) -> None:
    prompts = scenes.captions(range(70), HELD_OUT_WORLD + 4)
    image_set = ImageSet(load_system("pocket-student"), prompts, 4, tmp_path)
    images = collect(image_set)
    written = modification_times(tmp_path)
    assert images.shape == (70, 64, 64, 3) and len(written) == 2

    assert np.array_equal(collect(image_set), images)
    assert modification_times(tmp_path) == written


def put_into_cache(cache: Path, name: str, images: np.ndarray, noise_index: int) -> None:
    """Caches `images` as those that system `name` generates, so that none are generated."""
    prompts = scenes.captions(range(12), HELD_OUT_WORLD + 3)
    image_set = ImageSet(load_system(name), prompts, 3, cache, noise_index)
    tensors = {"pictures": from_numpy(images)}
    checkpoint.save(image_set.folder / "000000-12.safetensors", tensors, {"prompts": prompts})


def test_evaluate_gives_intervals_diversity_and_protocol_and_is_deterministic(
    tmp_path: Path,
) -> None:
    images = real_images(12, 3)
    put_into_cache(tmp_path, "pocket-teacher", images, 0)
    put_into_cache(tmp_path, "pocket-student", np.roll(images, 1, 0), 0)
    put_into_cache(tmp_path, "pocket-student", np.roll(images, 2, 0), 1)
    settings = EvaluateSettings(
        "pocket-student", tmp_path, seed=3, num_noises=2, num_resamples=30, count=12
    )
    first, second = evaluate(settings), evaluate(settings)
    for key in MACHINE_KEYS:
        first.pop(key, None)
        second.pop(key, None)
    assert first == second

    names = "frechet_distance clip_score attribute_accuracy diversity coverage recall".split()
    for name in names:
        low, high = first["intervals"][name]
        assert low <= first[name] <= high, name
    assert first["diversity"] > 0
    assert first["num_noises"] == 2 and first["diversity_count"] == 12
    assert first["protocol"] == "pocket" and first["protocol_settings"]["count"] == 12

    # The same images, for other captions
    assert first["precision"] == first["coverage"] == 1
    assert first["patch_frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_device_and_precision_apply_to_the_systems(tmp_path: Path) -> None:
    """A bfloat16 student's images differ from the float32 one's; its metrics remain numbers."""
    results = {}
    for precision in ("float32", "bfloat16"):
        settings = EvaluateSettings(
            "pocket-student",
            tmp_path / "cache",
            count=4,
            num_resamples=0,
            device="cpu",
            precision=precision,
        )
        with pytest.MonkeyPatch.context() as monkeypatch:
            # The teacher in few steps: its images are not what is tested
            monkeypatch.setattr(pocket, "load_system", load_teacher_in_two_steps)
            results[precision] = evaluate(settings)

    assert results["float32"]["dtype"] == "float32"
    assert results["bfloat16"]["dtype"] == "bfloat16"
    assert results["bfloat16"]["device"] == "cpu"
    float32_score = results["float32"]["clip_score"]
    bfloat16_score = results["bfloat16"]["clip_score"]
    assert bfloat16_score == pytest.approx(float32_score, rel=0.05)
    assert bfloat16_score != float32_score


def load_teacher_in_two_steps(name: str, **options: str) -> System:
    assert options["precision"] in ("float32", "bfloat16")
    return load_system(name, 2, **options)


def test_images_from_the_cache_have_the_features_of_fresh_ones_bit_for_bit(tmp_path: Path) -> None:
    """Convolutions round differently if their input has another order in memory."""
    prompts = scenes.captions(range(6), 1000)
    image_set = ImageSet(load_system("pocket-student"), prompts, 0, tmp_path)
    fresh = collect(image_set)
    cached = collect(image_set)
    assert fresh.strides == cached.strides and np.array_equal(fresh, cached)
    probe = load_probe()
    expected = probe_features(probe, cached)
    assert np.array_equal(probe_features(probe, fresh), expected)
    other_order = np.ascontiguousarray(cached.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert other_order.strides != cached.strides
    assert np.array_equal(probe_features(probe, other_order), expected)
