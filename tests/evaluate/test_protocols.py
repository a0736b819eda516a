"""Protocols and images: captions, image folders, feature caches, and a small COCO protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from diffusion2gan.cli import app
from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import backbones, coco, metrics, protocols
from diffusion2gan.evaluate.coco import FeatureSpaces
from diffusion2gan.evaluate.images import (
    ImageSet,
    centre_crop,
    iterate_images,
    noise_seeds,
    resize_centre_square,
    warn_if_few_images,
)
from diffusion2gan.evaluate.pocket import iterate_pocket_images
from diffusion2gan.evaluate.protocols import (
    COCO2014,
    POCKET,
    Protocol,
    captions_digest,
    check_same_protocol,
    describe_protocol,
    read_captions,
)
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import COCO_OPTIONS, EvaluateSettings
from diffusion2gan.pipelines.image_folder import open_images, open_system, read_image
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import models

SMALL = dataclasses.replace(COCO2014, count=7, side=32, patch=16)
CAPTIONS = [f"a red ring number {i}" for i in range(7)]


def save_images(folder: Path, count: int, seed: int, size: tuple[int, int] = (48, 40)) -> Path:
    """Writes `count` images of random pixels, `size` = (height, width), by caption index."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    return folder


def mean_colour_space() -> backbones.FeatureSpace:
    """A stand-in for Inception: the mean colour, three numbers."""
    return backbones.FeatureSpace(
        "inception", "1", lambda images: images.astype(np.float32).mean((1, 2))
    )


def collect(image_set: ImageSet) -> list[np.ndarray]:
    return [image for chunk in iterate_images(image_set) for image in chunk]


def resized(images: list[np.ndarray], side: int) -> np.ndarray:
    return np.stack([resize_centre_square(image, side) for image in images])


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP with random weights and 28 × 28 inputs."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = models.tokenizer()
    transformer = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **transformer,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**transformer, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = CLIPConfig(text_config=text, vision_config=vision)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    preprocessing = {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "resample": 3,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="module")
def tiny_dinov2(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DINOv2 with random weights, and the CLIP's preprocessing."""
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        Dinov2Model(config).save_pretrained(folder)

    preprocessing = (tiny_clip / "preprocessor_config.json").read_text()
    (folder / "preprocessor_config.json").write_text(preprocessing)
    return folder


# ---------------------------------------------------------------------------------- captions


def test_captions_of_a_text_file_and_of_annotations_are_the_same_list(tmp_path: Path) -> None:
    annotations = []
    for image_id, caption_id, caption in (
        (9, 90, "second  picture\n"),
        (4, 41, "later caption"),
        (4, 40, "first picture"),
        (11, 5, "third"),
    ):
        annotations.append({"image_id": image_id, "id": caption_id, "caption": caption})
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "captions.txt").write_text("first picture\nsecond picture\nthird\n")

    expected = ["first picture", "second picture", "third"]
    assert read_captions(tmp_path / "captions.json", 3) == expected
    assert read_captions(tmp_path / "captions.txt", 3) == expected


def test_captions_are_checked_by_count_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("first picture\nsecond picture\nthird\n")
    captions = read_captions(path, 3)
    digest = hashlib.sha256(b"first picture\nsecond picture\nthird").hexdigest()
    assert captions_digest(captions) == digest
    assert read_captions(path, 3, digest[:12].upper()) == captions

    message = f"have sha256 {digest}, not {'0' * 64}: it is another list"
    with pytest.raises(UserError, match=message):
        read_captions(path, 3, "0" * 64)
    with pytest.raises(UserError, match="has 3 captions, the protocol needs 30000"):
        read_captions(path, 30_000)
    with pytest.raises(UserError, match="no captions file"):
        read_captions(tmp_path / "none.txt", 3)
    path.write_text("one\n\nthree\n")
    with pytest.raises(UserError, match=r"has 1 blank lines \(line 2\)"):
        read_captions(path, 3)


# --------------------------------------------------------------------------- equal protocols


def described(protocol: Protocol = POCKET, **changes: Any) -> dict[str, Any]:
    """The protocol's keys of a metrics.json."""
    arguments: dict[str, Any] = {
        "captions": CAPTIONS,
        "seed": 0,
        "weights": {"inception": "ab"},
        "reference": "cd",
    }
    arguments.update(changes)
    return describe_protocol(protocol, **arguments)


def test_metrics_of_one_protocol_share_a_table() -> None:
    check_same_protocol({"a": described(), "b": described(), "c": described()})
    check_same_protocol({"a": {}, "b": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": COCO2014}, "name is 'pocket' for a and 'coco2014-30k' for b"),
        ({"captions": CAPTIONS[:3]}, "count is 7 for a and 3 for b"),
        ({"captions": CAPTIONS[::-1]}, "captions_sha256 is"),
        ({"seed": 1}, "seed is 0 for a and 1 for b"),
        (
            {"weights": {"inception": "xy"}},
            "feature_weights.inception is 'ab' for a and 'xy' for b",
        ),
        ({"reference": "ef"}, "reference_sha256 is"),
    ],
    ids=["protocol", "count", "captions", "seed", "weights", "reference"],
)
def test_metrics_of_different_protocols_are_refused_in_one_table(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_same_protocol({"a": described(), "b": described(**changes)})


def test_metrics_with_and_without_a_protocol_are_refused_in_one_table() -> None:
    with pytest.raises(UserError, match="cannot be shown in one table"):
        check_same_protocol({"a": described(), "b": {"frechet_distance": 1.0}})


# ----------------------------------------------------------------------------------- options


def option_arguments(name: str) -> list[str]:
    value = "4" if name == "batch_size" else "name"
    return ["--" + name.replace("_", "-"), value]


@pytest.mark.parametrize("name", COCO_OPTIONS)
def test_pocket_refuses_options_of_the_coco_protocols(name: str, tmp_path: Path) -> None:
    arguments = option_arguments(name)
    message = f"--protocol pocket does not use {arguments[0]}: .* Leave {arguments[0]} out, or"
    out = ["--out", str(tmp_path / "metrics.json")]
    with pytest.raises(UserError, match=message):
        app(["evaluate", "pocket-student", *arguments, *out], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_pocket_names_all_options_that_it_does_not_use(tmp_path: Path) -> None:
    settings = EvaluateSettings("pocket-student", tmp_path, teacher="a", batch_size=2)
    message = r"does not use --teacher, --batch-size: .* \(coco2014-30k, coco2017-5k\)"
    with pytest.raises(UserError, match=message):
        evaluate(settings)


def test_coco_refuses_count(tmp_path: Path) -> None:
    message = "coco2017-5k does not use --count: it is defined on exactly 5000 captions, .* pocket"
    command = "evaluate pocket-student --protocol coco2017-5k --count 10 --captions a --reference b"
    with pytest.raises(UserError, match=message):
        app([*command.split(), "--out", str(tmp_path / "metrics.json")], standalone_mode=False)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ images


def test_noise_seeds_depend_only_on_the_caption_index_and_never_repeat() -> None:
    first = noise_seeds(0, range(1000))
    assert noise_seeds(0, [7]) == [first[7]]

    seen: set[int] = set()
    for seed in (0, 1):
        for noise_index in (0, 1, 2):
            seen.update(noise_seeds(seed, range(1000), noise_index))
    assert len(seen) == 6000


def test_image_folder_is_read_by_caption_index(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "pictures", 3, 1)
    images = open_images("gigagan", folder)
    assert np.array_equal(next(images.read([2])), np.asarray(Image.open(folder / "000002.png")))
    assert images.formats == ["png"] and images.note == "images"


def test_image_folder_refuses_missing_double_unnamed_and_damaged_images(tmp_path: Path) -> None:
    folder = save_images(tmp_path / "pictures", 3, 1)
    with pytest.raises(UserError, match="has no image for caption 3"):
        open_images("gigagan", folder).check(range(5))

    (folder / "other_000002.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="both for caption 2"):
        open_images("gigagan", folder)
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(folder / "other_000002.jpg")

    (folder / "other_000002.jpg").rename(folder / "cover.jpg")
    with pytest.raises(UserError, match="must contain its caption's index"):
        open_images("gigagan", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        open_images("gigagan", tmp_path / "empty")


def test_pocket_protocol_measures_an_image_folder_and_refuses_other_sizes(tmp_path: Path) -> None:
    wide = open_system(f"gigagan={save_images(tmp_path / 'wide', 4, 2)}")
    message = "generates 40×48 images; the pocket protocol measures 64×64 images"
    with pytest.raises(UserError, match=message):
        next(iterate_pocket_images([ImageSet(wide, CAPTIONS[:4], 0, tmp_path)]))

    folder = save_images(tmp_path / "square", 4, 3, (64, 64))
    square = ImageSet(open_system(str(folder)), CAPTIONS[:4], 0, tmp_path)
    ((images,),) = iterate_pocket_images([square])
    assert images.shape == (4, 64, 64, 3)
    with pytest.raises(UserError, match="neither a number of steps nor a guidance scale"):
        open_system(str(folder), 4)


def test_centre_square_is_resized_by_lanczos_and_centre_crop_is_not_resized() -> None:
    image = np.random.default_rng(4).integers(0, 255, (40, 60, 3), np.uint8)
    expected = Image.fromarray(image[:, 10:50]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(resize_centre_square(image, 16), np.asarray(expected))
    assert np.array_equal(resize_centre_square(image, 40), image[:, 10:50])

    assert np.array_equal(centre_crop(image[None], 20)[0], image[10:30, 20:40])
    with pytest.raises(UserError, match="patches of 64 pixels cannot be cut out of 60×40"):
        centre_crop(image[None], 64)


# -------------------------------------------------------------------------- feature networks


def test_clip_features_match_transformers(tiny_clip: Path) -> None:
    images = np.random.default_rng(5).integers(0, 255, (3, 40, 61, 3), np.uint8)

    # Preprocessing. Where transformers resizes with torchvision, values differ by ±1 of 255;
    # otherwise by 1e-6.
    processor = CLIPImageProcessor.from_pretrained(tiny_clip)
    expected_pixels = processor(list(images), return_tensors="pt").pixel_values
    pixels = backbones.load_preprocessing(tiny_clip)(images)
    assert pixels.shape == expected_pixels.shape
    assert (pixels - expected_pixels).abs().max() < 0.06

    # Embeddings
    space = backbones.load_clip(str(tiny_clip))
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        embeds = model.get_image_features(pixel_values=pixels).pooler_output
    expected = torch.nn.functional.normalize(embeds, dim=1).numpy()
    features = space.extract(images)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_allclose(features[1:2], space.extract(images[1:2]), atol=1e-5)
    assert space.encode_texts(CAPTIONS).shape == (7, expected.shape[1])


def test_features_are_cached_by_network_and_image_content(tmp_path: Path) -> None:
    calls: list[int] = []

    def extract(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        return images.reshape(len(images), -1)[:, :4].astype(np.float32)

    # Equal images: extracted once
    images = np.random.default_rng(6).integers(0, 255, (5, 4, 4, 3), np.uint8)
    space = backbones.FeatureSpace("counted", "1", extract)
    first = backbones.extract_chunk_cached(space, images, tmp_path)
    again = backbones.extract_chunk_cached(space, images.copy(), tmp_path)
    assert np.array_equal(again, first) and calls == [5]

    # Another revision, and one pixel changed
    revised = dataclasses.replace(space, revision="2")
    backbones.extract_chunk_cached(revised, images, tmp_path)
    changed = images.copy()
    changed[0, 0, 0, 0] ^= 1
    found = backbones.extract_chunk_cached(space, changed, tmp_path)
    assert not np.array_equal(found, first) and calls == [5, 5, 5]


def test_features_that_are_not_finite_are_refused_and_not_cached(tmp_path: Path) -> None:
    images = np.zeros((5, 4, 4, 3), np.uint8)
    space = backbones.FeatureSpace(
        "bad", "1", lambda images: np.full((len(images), 2), np.nan, np.float32)
    )
    with pytest.raises(UserError, match="bad: the features of 5 of 5 images are not finite"):
        backbones.extract_chunk_cached(space, images, tmp_path)
    assert not list(tmp_path.glob("bad-*"))


# ------------------------------------------------------------------------------------- COCO


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_small_coco_protocol_gives_the_same_from_the_cache_and_from_nothing(
    tiny_teacher: Path, tiny_clip: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    reference = save_images(tmp_path / "real", 9, 7)
    clip = backbones.load_clip(str(tiny_clip))
    dinov2 = backbones.load_dinov2(str(tiny_dinov2))
    spaces = FeatureSpaces(mean_colour_space(), clip, dinov2)
    system = load_system(str(tiny_teacher), 1)

    def measure(cache: Path, batch_size: int) -> dict[str, Any]:
        image_set = ImageSet(system, CAPTIONS, 0, cache, batch_size=batch_size)
        return coco.measure(image_set, SMALL, reference, spaces, num_resamples=50)

    # From the cache, and from nothing
    first = measure(tmp_path / "cache", 3)
    written = modification_times(tmp_path / "cache")
    assert measure(tmp_path / "cache", 7) == first
    assert modification_times(tmp_path / "cache") == written
    assert measure(tmp_path / "other", 3) == first
    assert first["protocol_settings"]["captions_sha256"] == captions_digest(CAPTIONS)

    # Values
    generated = resized(collect(ImageSet(system, CAPTIONS, 0, tmp_path / "cache")), 32)
    real = resized([read_image(path) for path in sorted(reference.iterdir())], 32)
    expected = metrics.frechet_distance(generated.mean((1, 2)), real.mean((1, 2)))
    assert first["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    score = metrics.clip_score(clip.extract(generated), clip.encode_texts(CAPTIONS))
    assert first["clip_score"] == pytest.approx(score, abs=1e-6)


def test_coco_needs_a_feature_network() -> None:
    with pytest.raises(UserError, match="no feature network given"):
        FeatureSpaces()


@pytest.fixture
def coco_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """COCO's layout with eight images; the protocol has seven captions instead of 30 000."""
    small = dataclasses.replace(COCO2014, count=7)
    monkeypatch.setitem(protocols.PROTOCOLS, "coco2014-30k", small)
    rng = np.random.default_rng(11)
    folder = tmp_path / "coco"
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()

    # One image more than captions: all of val2014 is the reference
    annotations = []
    for i in range(8):
        pixels = rng.integers(0, 255, (9, 12, 3), np.uint8)
        image = Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(folder / "val2014" / f"COCO_val2014_{42 + i:012d}.jpg", quality=95)
        for k in range(2):
            caption_id = 900 - 10 * i + k
            caption = f"a ring {i}, caption {k}\n"
            annotations.append({"image_id": 42 + i, "id": caption_id, "caption": caption})

    content = {"images": [], "annotations": annotations[::-1]}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    save_images(folder / "made", 7, 12, (512, 512))
    return folder


def resized_by_pillow(folder: Path) -> np.ndarray:
    """[N, 256, 256, 3]: the protocol's resizing by Pillow alone: centre crop and Lanczos."""
    images = []
    for path in sorted(folder.iterdir()):
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        images.append(np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS)))
    return np.stack(images)


def run_coco(folder: Path, *options: object) -> dict[str, Any]:
    """metrics.json of the images in `made` by the command."""
    arguments = [
        "evaluate",
        f"gigagan={folder / 'made'}",
        "--protocol",
        "coco2014-30k",
        "--captions",
        folder / "annotations" / "captions_val2014.json",
        "--reference",
        folder / "val2014",
        "--out",
        folder / "metrics.json",
        "--num-resamples",
        40,
        *options,
    ]
    app([str(argument) for argument in arguments], standalone_mode=False)
    return dict(json.loads((folder / "metrics.json").read_text()))


def test_coco_command_measures_cocos_layout(
    coco_folder: Path, tiny_clip: Path, tiny_dinov2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_images(coco_folder / "made_more", 9, 12, (512, 512))
    result = run_coco(
        coco_folder, "--clip", tiny_clip, "--dinov2", tiny_dinov2, "--teacher", teacher
    )
    printed = "".join(capsys.readouterr().err.split())  # a long path is folded anywhere
    assert "made_more:contains9images;thoseofthe7captionsareused" in printed

    # Images, captions and features
    captions = [f"a ring {i}, caption 0" for i in range(7)]
    made = resized_by_pillow(coco_folder / "made")
    real = resized_by_pillow(coco_folder / "val2014")
    read = [read_image(path) for path in sorted((coco_folder / "made").iterdir())]
    assert np.array_equal(made, resized(read, 256))
    clip = backbones.load_clip(str(tiny_clip))
    dinov2 = backbones.load_dinov2(str(tiny_dinov2))
    clip_made, clip_real = clip.extract(made), clip.extract(real)

    # Metrics
    score = metrics.clip_score(clip_made, clip.encode_texts(captions))
    assert result["clip_score"] == pytest.approx(score, abs=1e-6)
    assert result["cmmd"] == pytest.approx(metrics.cmmd(clip_made, clip_real), abs=1e-6)
    distance = metrics.frechet_distance(dinov2.extract(made), dinov2.extract(real))
    assert result["frechet_distance_dinov2"] == pytest.approx(distance, rel=1e-4)
    assert result["same_noise_distance"] == pytest.approx(0, abs=1e-6)  # the same images
    low, high = result["intervals"]["cmmd"]
    assert low < result["cmmd"] < high

    # Description
    assert result["count"] == 7 and result["reference_count"] == 8
    assert result["picture_format"] == "png"
    assert result["protocol_settings"]["captions_sha256"] == captions_digest(captions)


def test_coco_command_refuses_other_captions_damaged_and_missing_images(
    coco_folder: Path, tiny_clip: Path
) -> None:
    with pytest.raises(UserError, match="it is another list"):
        run_coco(coco_folder, "--clip", tiny_clip, "--captions-sha256", "0" * 64)

    (coco_folder / "val2014" / "COCO_val2014_000000000043.jpg").write_bytes(b"\xff\xd8 cut off")
    with pytest.raises(UserError, match=r"000000000043.jpg cannot be read as an image"):
        run_coco(coco_folder, "--clip", tiny_clip)

    (coco_folder / "made" / "000005.png").unlink()
    message = r"no image for caption 5\. .* has 6 images, and 7 are needed"
    with pytest.raises(UserError, match=message):
        run_coco(coco_folder, "--clip", tiny_clip)


def test_coco_measures_same_noise_distance_and_diversity(
    tiny_teacher: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    reference = save_images(tmp_path / "real", 6, 7)
    dinov2 = backbones.load_dinov2(str(tiny_dinov2))
    system, teacher = load_system(str(tiny_teacher), 1), load_system(str(tiny_teacher), 2)
    image_set = ImageSet(system, CAPTIONS, 0, tmp_path / "cache", batch_size=1)
    result = coco.measure(
        image_set,
        SMALL,
        reference,
        FeatureSpaces(dinov2=dinov2),
        teacher=teacher,
        num_noises=3,
        num_resamples=20,
    )

    # Features of three images per caption and of the teacher's
    features = []
    for source, noise_index in ((system, 0), (system, 1), (system, 2), (teacher, 0)):
        images = ImageSet(source, CAPTIONS, 0, tmp_path, noise_index)
        features.append(dinov2.extract(resized(collect(images), 32)))

    def cosine_distance(i: int, j: int) -> np.ndarray:
        a, b = features[i], features[j]
        return 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    expected = cosine_distance(0, 3).mean()
    assert result["same_noise_distance"] == pytest.approx(expected, abs=1e-5)
    diversity = np.mean([cosine_distance(0, 1), cosine_distance(0, 2), cosine_distance(1, 2)])
    assert result["diversity"] == pytest.approx(diversity, abs=1e-5)
    assert (result["num_noises"], result["diversity_count"]) == (3, 7)
    assert "dinov2" in result["similarity"]
    assert set(result["intervals"]) >= {"same_noise_distance", "diversity"}

    # One table needs one teacher
    other = {**result, "same_noise_teacher": "another"}
    with pytest.raises(UserError, match="measured to different teachers"):
        check_same_protocol({"a": result, "b": other})
    del other["same_noise_teacher"]
    check_same_protocol({"a": result, "b": other})


def test_coco_similarity_needs_dinov2_or_clip(tiny_teacher: Path, tmp_path: Path) -> None:
    reference = save_images(tmp_path / "real", 6, 7)
    system, teacher = load_system(str(tiny_teacher), 1), load_system(str(tiny_teacher), 2)
    spaces = FeatureSpaces(inception=mean_colour_space())
    image_set = ImageSet(system, CAPTIONS, 0, tmp_path / "cache")
    with pytest.raises(UserError, match="give --dinov2 or --clip"):
        coco.measure(image_set, SMALL, reference, spaces, teacher=teacher)


# ---------------------------------------------------------------------------------- messages


def test_few_images_give_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_few_images(2049, 2048, "use more")
    assert not capsys.readouterr().err

    warn_if_few_images(2048, 2048, "use more")
    message = (
        "2048 images for features of 2048 dimensions: their covariance is singular, "
        ".* how few images there are; use more"
    )
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_out_that_is_a_folder_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    message = r"is a folder; name the JSON file to write, such as .*metrics\.json"
    with pytest.raises(UserError, match=message):
        app(["evaluate", "pocket-student", "--out", str(tmp_path)], standalone_mode=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pocket-studnt", "pocket-studnt is not a folder; did you mean 'pocket-student'"),
        (
            "pocket-student --protocol coco2014",
            "no such protocol: 'coco2014'; did you mean 'coco2014-30k'",
        ),
        (
            "pocket-student --protocol coco2017-5k",
            "needs --captions FILE and --reference FOLDER",
        ),
    ],
    ids=["system", "protocol", "captions"],
)
def test_unknown_names_and_missing_options_are_refused_with_the_remedy(
    arguments: str, message: str, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "m.json")]
    with pytest.raises(UserError, match=message):
        app(["evaluate", *arguments.split(), *out], standalone_mode=False)


def test_feature_network_that_is_not_downloaded_is_refused_with_the_command() -> None:
    with pytest.raises(UserError, match="hf download nobody/no-such-clip"):
        backbones.load_clip("nobody/no-such-clip")
    with pytest.raises(UserError, match="no-such-clip is neither a folder nor a hub id"):
        backbones.load_clip("no-such-clip")


def test_inception_refuses_other_weights_and_matches_torch_fidelity(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="no weights file"):
        backbones.load_inception(weights)
    torch.save({"a": torch.zeros(1)}, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"has sha256 {digest}, expected 6726825d"):
        backbones.load_inception(weights)

    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:
        with pytest.raises(UserError, match=r"pip install 'diffusion2gan\[eval\]'"):
            backbones.load_inception(weights, digest[:8])
        pytest.skip(f"torch-fidelity does not load: {error}")

    network = random_inception(module)
    torch.save(network.state_dict(), weights)
    space = backbones.load_inception(weights, hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    images = np.random.default_rng(8).integers(0, 255, (2, 299, 299, 3), np.uint8)
    expected = network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy()
    assert space.extract(images).shape == (2, 2048)
    np.testing.assert_allclose(space.extract(images), expected, rtol=1e-4, atol=1e-5)
    assert space.extract(images[:, :200, :200]).shape == (2, 2048)


def random_inception(module: Any) -> torch.nn.Module:
    """torch-fidelity's network with random weights: the state that it tries to load is ignored."""
    network_class = module.FeatureExtractorInceptionV3

    class RandomInception(network_class):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state: object, *args: object, **kwargs: object) -> None:
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return RandomInception("inception", ["2048"], feature_extractor_weights_path=empty)
