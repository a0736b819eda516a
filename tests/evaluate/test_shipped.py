"""The weights inside the package: whole, small enough, and as good as the documents say (loosely: few pictures)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import from_numpy

from diffusion2gan import assets
from diffusion2gan.evaluate.features import PocketClip, attributes_right, load_probe
from diffusion2gan.evaluate.metrics import clip_score, share
from diffusion2gan.evaluate.run import HELD_OUT_WORLD, evaluate, real_pictures, render
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime import checkpoint


def test_all_weights_are_there_and_small() -> None:
    files = [path for path in assets.ROOT.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    pairs = sum(size for path, size in sizes.items() if path.parent.name == "pairs")
    assert sum(sizes.values()) - pairs <= 30e6 and pairs <= 10e6
    assert not {path.suffix for path in files} & {
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
    }  # safetensors alone
    for name in ("teacher", "student", "clip", "probe", "latent_vgg"):
        assert assets.folder(name).is_dir()


def test_the_probe_reads_real_pictures() -> None:
    prompts = scenes.captions(range(400), HELD_OUT_WORLD + 5)
    pictures = real_pictures(400, seed=5)
    right = attributes_right(load_probe(), pictures, prompts)
    objects = sum(scenes.parse_caption(prompt).count for prompt in prompts)
    assert len(right["count"]) == 400 and len(right["shape"]) == objects
    assert share([answer for answers in right.values() for answer in answers]) >= 0.97
    others = attributes_right(load_probe(), np.roll(pictures, 1, axis=0), prompts)
    assert share([answer for answers in others.values() for answer in answers]) <= 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bar"), [("pocket-teacher", 0.90), ("pocket-student", 0.80)])
def test_bar_attributes(name: str, bar: float, tmp_path: Path) -> None:
    """The bar is one of 1 000 captions (docs/results); 256 others have a standard error of about a point."""
    count, prompts = 256, scenes.captions(range(256), HELD_OUT_WORLD + 3)
    pictures = render(load_system(name), prompts, 3, tmp_path)
    right = attributes_right(load_probe(), pictures, prompts)
    assert len(right["count"]) == count
    assert share([answer for answers in right.values() for answer in answers]) >= bar


def test_clip_knows_which_caption_is_whose() -> None:
    clip = PocketClip()
    prompts, pictures = scenes.captions(range(64), HELD_OUT_WORLD + 6), real_pictures(64, seed=6)
    embeds, texts = clip.images(pictures).image_embeds, clip.texts(prompts)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
    assert clip_score(embeds, texts) > clip_score(embeds, np.roll(texts, 1, axis=0)) + 0.1
    ranks = (embeds @ texts.T).argmax(1) == np.arange(64)
    assert ranks.mean() > 0.5


@pytest.mark.slow
def test_evaluate_tells_teacher_student_and_chance_apart(tmp_path: Path) -> None:
    count = 64
    teacher = evaluate("pocket-teacher", count=count, seed=3, cache=tmp_path)
    student = evaluate("pocket-student", count=count, seed=3, cache=tmp_path)
    one_step = evaluate(
        "pocket-teacher", count=count, seed=3, cache=tmp_path, num_inference_steps=1
    )
    assert set(teacher) == set(student) == set(one_step)
    assert teacher["same_noise_distance"] == pytest.approx(0, abs=1e-6)
    assert 0 < student["same_noise_distance"] < one_step["same_noise_distance"]
    assert teacher["frechet_distance"] < one_step["frechet_distance"]
    assert student["frechet_distance"] < one_step["frechet_distance"]
    # The bars themselves stand above.
    assert teacher["attribute_accuracy"] > one_step["attribute_accuracy"] + 0.3
    assert student["attribute_accuracy"] > one_step["attribute_accuracy"] + 0.2
    assert student["num_inference_steps"] == 1 and teacher["num_inference_steps"] == 50


def test_rendered_pictures_are_kept_and_reused(tmp_path: Path) -> None:
    system, prompts = load_system("pocket-student"), scenes.captions(range(70), HELD_OUT_WORLD + 4)
    pictures = render(system, prompts, 4, tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert pictures.shape == (70, 64, 64, 3) and len(kept) == 2
    assert np.array_equal(render(system, prompts, 4, tmp_path), pictures)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == kept


def test_evaluate_tells_intervals_diversity_and_protocol_and_the_same_twice(tmp_path: Path) -> None:
    made = real_pictures(12, 3)
    for nth, shift in ((0, 1), (1, 2)):
        _keep(tmp_path, "pocket-student", np.roll(made, shift, 0), nth)
    _keep(tmp_path, "pocket-teacher", made, 0)
    told = [
        evaluate("pocket-student", count=12, seed=3, cache=tmp_path, num_noises=2, num_resamples=30)
        for _ in range(2)
    ]
    timed = {"seconds_per_image", "seconds_per_image_p90", "images_per_second", "peak_memory_bytes"}
    assert {k: v for k, v in told[0].items() if k not in timed} == {
        k: v for k, v in told[1].items() if k not in timed
    }
    for key in (
        "frechet_distance",
        "clip_score",
        "attribute_accuracy",
        "diversity",
        "coverage",
        "recall",
    ):
        low, high = told[0]["intervals"][key]
        assert low <= told[0][key] <= high, key
    assert (
        told[0]["diversity"] > 0 and told[0]["num_noises"] == 2 and told[0]["diversity_count"] == 12
    )
    assert told[0]["precision"] == told[0]["coverage"] == 1  # the same pictures, of other captions
    assert told[0]["patch_frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert told[0]["protocol"] == "pocket" and told[0]["protocol_settings"]["count"] == 12


def _keep(cache: Path, name: str, pictures: np.ndarray, nth: int) -> None:
    """Puts pictures where `render` keeps a system's, so that nothing is made."""
    prompts = scenes.captions(range(12), HELD_OUT_WORLD + 3)
    folder = f"{load_system(name).key}-3" + (f"-noise{nth}" if nth else "")
    checkpoint.save(
        cache / folder / "000000-12.safetensors",
        {"pictures": from_numpy(pictures)},
        {"prompts": prompts},
    )
