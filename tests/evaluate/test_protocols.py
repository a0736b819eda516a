"""Protocols and pictures: captions, image folders, feature caches, and a COCO protocol in miniature."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from diffusion2gan.cli import app
from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import backbones, metrics, protocols, run
from diffusion2gan.evaluate.coco import evaluate_coco
from diffusion2gan.evaluate.pictures import fitted, middle, noise_seeds, warn_few
from diffusion2gan.evaluate.protocols import (
    COCO2014,
    POCKET,
    captions_digest,
    check_same,
    describe,
    read_captions,
)
from diffusion2gan.pipelines.image_folder import open_images, read_image
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import models

SMALL = dataclasses.replace(COCO2014, count=7, side=32, patch=16)
CAPTIONS = [f"a red ring number {i}" for i in range(7)]


def save_pictures(folder: Path, count: int, seed: int, side: tuple[int, int] = (48, 40)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (*side, 3), np.uint8)).save(folder / f"{i:06d}.png")
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    words = models.tokenizer()
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = small | {
        "vocab_size": len(words),
        "max_position_embeddings": 77,
        "eos_token_id": words.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = CLIPConfig(
            text_config=text, vision_config=small | {"image_size": 28, "patch_size": 14}
        )
        CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    prepared = {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "resample": 3,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder


@pytest.fixture(scope="module")
def tiny_dinov2(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        Dinov2Model(
            Dinov2Config(
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            )
        ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        (tiny_clip / "preprocessor_config.json").read_text()
    )
    return folder


def test_captions_of_lines_and_of_annotations_are_one_list(tmp_path: Path) -> None:
    rows = [
        (9, 90, "second  picture\n"),
        (4, 41, "later caption"),
        (4, 40, "first picture"),
        (11, 5, "third"),
    ]
    told = {"annotations": [{"image_id": i, "id": k, "caption": text} for i, k, text in rows]}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    (tmp_path / "captions.txt").write_text("first picture\nsecond picture\nthird\n")
    lists = [read_captions(tmp_path / f"captions.{form}", 3) for form in ("json", "txt")]
    assert lists[0] == lists[1] == ["first picture", "second picture", "third"]
    digest = hashlib.sha256(b"first picture\nsecond picture\nthird").hexdigest()
    assert captions_digest(lists[0]) == digest
    assert read_captions(tmp_path / "captions.txt", 3, digest[:12].upper()) == lists[0]
    with pytest.raises(
        UserError, match=f"have sha256 {digest}, not {'0' * 64}: it is another list"
    ):
        read_captions(tmp_path / "captions.txt", 3, "0" * 64)
    with pytest.raises(UserError, match="has 3 captions, the protocol needs 30000"):
        read_captions(tmp_path / "captions.txt", 30_000)
    with pytest.raises(UserError, match="no captions file"):
        read_captions(tmp_path / "none.txt", 3)
    (tmp_path / "captions.txt").write_text("one\n\nthree\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        read_captions(tmp_path / "captions.txt", 3)


def test_metrics_of_different_protocols_refuse_one_table() -> None:
    def of(**more: object) -> dict[str, object]:
        settings = {
            "captions": CAPTIONS,
            "seed": 0,
            "weights": {"inception": "ab"},
            "reference": "cd",
        } | more
        return describe(
            more.pop("protocol", POCKET), **{k: v for k, v in settings.items() if k != "protocol"}
        )  # type: ignore[arg-type]

    check_same({"a": of(), "b": of(), "c": of()})
    check_same({"a": {}, "b": {}})
    for more, told in (
        ({"protocol": COCO2014}, "name is 'pocket' for a and 'coco2014-30k' for b"),
        ({"captions": CAPTIONS[:3]}, "count is 7 for a and 3 for b"),
        ({"captions": CAPTIONS[::-1]}, "captions_sha256 is"),
        ({"seed": 1}, "seed is 0 for a and 1 for b"),
        (
            {"weights": {"inception": "xy"}},
            "feature_weights.inception is 'ab' for a and 'xy' for b",
        ),
        ({"reference": "ef"}, "reference_sha256 is"),
    ):
        with pytest.raises(UserError, match=told):
            check_same({"a": of(), "b": of(**more)})
    with pytest.raises(UserError, match="cannot stand in one table"):
        check_same({"a": of(), "b": {"frechet_distance": 1.0}})


def test_noises_depend_on_the_caption_alone_and_never_meet() -> None:
    first = noise_seeds(0, range(1000))
    assert noise_seeds(0, [7]) == [first[7]]
    all_of = [noise_seeds(seed, range(1000), nth) for seed in (0, 1) for nth in (0, 1, 2)]
    assert len({seed for seeds in all_of for seed in seeds}) == 6000


def test_images_by_caption_index(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "pictures", 3, 1)
    images = open_images("gigagan", folder)
    assert np.array_equal(images.read([2])[0], np.asarray(Image.open(folder / "000002.png")))
    assert images.formats == ["png"] and images.note == "pictures"
    with pytest.raises(UserError, match="has no image for caption 3"):
        images.read(range(5))
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


def test_the_pocket_protocol_measures_a_folder_and_refuses_other_sizes(tmp_path: Path) -> None:
    system = run.open_system(f"gigagan={save_pictures(tmp_path / 'wide', 4, 2)}")
    with pytest.raises(
        UserError, match="makes 40×48 pictures; the pocket protocol measures 64×64 ones"
    ):
        run.render(system, CAPTIONS[:4], 0, tmp_path)
    folder = save_pictures(tmp_path / "square", 4, 3, (64, 64))
    assert run.render(run.open_system(str(folder)), CAPTIONS[:4], 0, tmp_path).shape == (
        4,
        64,
        64,
        3,
    )
    with pytest.raises(UserError, match="neither a number of steps nor a guidance scale"):
        run.open_system(str(folder), 4)


def test_fitted_is_a_centre_square_by_lanczos_and_middle_resizes_nothing() -> None:
    rng = np.random.default_rng(4)
    picture = rng.integers(0, 255, (40, 60, 3), np.uint8)
    square = Image.fromarray(picture[:, 10:50]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(fitted(picture, 16), np.asarray(square))
    assert np.array_equal(fitted(picture, 40), picture[:, 10:50])
    pictures = picture[None]
    assert np.array_equal(middle(pictures, 20)[0], picture[10:30, 20:40])
    with pytest.raises(UserError, match="patches of 64 pixels cannot be cut out of 60×40"):
        middle(pictures, 64)


def test_clip_prepares_pictures_as_transformers_does(tiny_clip: Path) -> None:
    pictures = np.random.default_rng(5).integers(0, 255, (3, 40, 61, 3), np.uint8)
    theirs = CLIPImageProcessor.from_pretrained(tiny_clip)(
        list(pictures), return_tensors="pt"
    ).pixel_values
    ours = backbones.preprocessing(tiny_clip)(pictures)
    assert ours.shape == theirs.shape
    assert (
        ours - theirs
    ).abs().max() < 0.06  # ±1 of 255 where torchvision resizes for transformers; else 1e-6
    space = backbones.clip(str(tiny_clip))
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    with torch.no_grad():
        embeds = model.get_image_features(pixel_values=ours).pooler_output
    expected = torch.nn.functional.normalize(embeds, dim=1).numpy()
    np.testing.assert_allclose(space.features(pictures), expected, atol=1e-5)
    np.testing.assert_allclose(
        space.features(pictures)[1:2], space.features(pictures[1:2]), atol=1e-5
    )
    assert space.texts(CAPTIONS).shape == (7, expected.shape[1])


def test_features_are_kept_by_what_they_are_of(tmp_path: Path) -> None:
    calls: list[int] = []

    def count(pictures: np.ndarray) -> np.ndarray:
        calls.append(len(pictures))
        return pictures.reshape(len(pictures), -1)[:, :4].astype(np.float32)

    pictures = np.random.default_rng(6).integers(0, 255, (5, 4, 4, 3), np.uint8)
    space = backbones.Space("counted", "1", count)
    first = backbones.cached(space, pictures, tmp_path)
    assert np.array_equal(backbones.cached(space, pictures.copy(), tmp_path), first) and calls == [
        5
    ]
    backbones.cached(dataclasses.replace(space, revision="2"), pictures, tmp_path)
    changed = pictures.copy()
    changed[0, 0, 0, 0] ^= 1
    assert not np.array_equal(backbones.cached(space, changed, tmp_path), first) and calls == [
        5,
        5,
        5,
    ]
    bad = dataclasses.replace(
        space, name="bad", features=lambda p: np.full((len(p), 2), np.nan, np.float32)
    )
    with pytest.raises(UserError, match="bad: the features of 5 of 5 pictures are not finite"):
        backbones.cached(bad, pictures, tmp_path)
    assert not list(tmp_path.glob("bad-*"))


def test_a_coco_protocol_in_miniature_twice(
    tiny_teacher: Path, tiny_clip: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    reference = save_pictures(tmp_path / "real", 9, 7)
    clip, dinov2 = backbones.clip(str(tiny_clip)), backbones.dinov2(str(tiny_dinov2))
    stand_in = backbones.Space("inception", "1", lambda p: p.astype(np.float32).mean((1, 2)))
    system = load_system(str(tiny_teacher), 1)

    def measured(cache: Path, batch_size: int) -> dict[str, object]:
        return evaluate_coco(
            system,
            SMALL,
            CAPTIONS,
            reference,
            cache,
            inception=stand_in,
            clip=clip,
            dinov2=dinov2,
            batch_size=batch_size,
            num_resamples=50,
        )

    first = measured(tmp_path / "cache", 3)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert measured(tmp_path / "cache", 7) == first  # from what is kept
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")
    } == made
    again = measured(tmp_path / "other", 3)
    assert again == first
    assert first["protocol_settings"]["captions_sha256"] == captions_digest(CAPTIONS)  # type: ignore[index]
    ours = np.stack(
        [fitted(p, 32) for p in run.render_any(system, CAPTIONS, 0, tmp_path / "cache")]
    )
    theirs = np.stack([fitted(read_image(p), 32) for p in sorted(reference.iterdir())])
    expected = metrics.frechet_distance(ours.mean((1, 2)), theirs.mean((1, 2)))
    assert first["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert first["clip_score"] == pytest.approx(
        metrics.clip_score(clip.features(ours), clip.texts(CAPTIONS)), abs=1e-6
    )
    with pytest.raises(UserError, match="no feature network given"):
        evaluate_coco(system, SMALL, CAPTIONS, reference, tmp_path)


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """COCO's own layout with seven pictures, the protocol being pinned to seven captions: everything else is COCO's."""
    monkeypatch.setitem(protocols.PROTOCOLS, "coco2014-30k", dataclasses.replace(COCO2014, count=7))
    rng = np.random.default_rng(11)
    folder = tmp_path / "coco"
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    rows = []
    for i in range(8):  # one picture more than captions: all of val2014 is the reference
        rough = Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        rough.save(folder / "val2014" / f"COCO_val2014_{42 + i:012d}.jpg", quality=95)
        rows += [
            {"image_id": 42 + i, "id": 900 - 10 * i + k, "caption": f"a ring {i}, told {k}\n"}
            for k in range(2)
        ]
    (folder / "annotations" / "captions_val2014.json").write_text(
        json.dumps({"images": [], "annotations": rows[::-1]})
    )
    save_pictures(folder / "made", 7, 12, (512, 512))
    return folder


def by_pillow(path: Path) -> np.ndarray:
    """The protocol's 256 pixels by Pillow alone: its own centre crop, its own Lanczos."""
    picture = Image.open(path).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS))


def test_cocos_own_layout_by_the_command(
    coco: Path, tiny_clip: Path, tiny_dinov2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*options: object) -> dict[str, object]:
        arguments = [
            "evaluate",
            f"gigagan={coco / 'made'}",
            "--protocol",
            "coco2014-30k",
            "--captions",
            coco / "annotations" / "captions_val2014.json",
            "--reference",
            coco / "val2014",
            "--out",
            coco / "metrics.json",
            "--num-resamples",
            40,
            *options,
        ]
        app(list(map(str, arguments)), standalone_mode=False)
        return json.loads((coco / "metrics.json").read_text())

    save_pictures(coco / "made_more", 9, 12, (512, 512))
    told = measured("--clip", tiny_clip, "--dinov2", tiny_dinov2, "--teacher", coco / "made_more")
    told_err = "".join(capsys.readouterr().err.split())  # a long path is folded anywhere
    assert "made_more:9pictures,andthoseof7captionsaretaken" in told_err
    captions = [f"a ring {i}, told 0" for i in range(7)]
    clip, dinov2 = backbones.clip(str(tiny_clip)), backbones.dinov2(str(tiny_dinov2))
    made = np.stack([by_pillow(path) for path in sorted((coco / "made").iterdir())])
    real = np.stack([by_pillow(path) for path in sorted((coco / "val2014").iterdir())])
    assert np.array_equal(
        made,
        np.stack([fitted(read_image(path), 256) for path in sorted((coco / "made").iterdir())]),
    )
    assert told["clip_score"] == pytest.approx(
        metrics.clip_score(clip.features(made), clip.texts(captions)), abs=1e-6
    )
    assert told["cmmd"] == pytest.approx(
        metrics.cmmd(clip.features(made), clip.features(real)), abs=1e-6
    )
    expected = metrics.frechet_distance(dinov2.features(made), dinov2.features(real))
    assert told["frechet_distance_dinov2"] == pytest.approx(expected, rel=1e-4)
    assert told["same_noise_distance"] == pytest.approx(0, abs=1e-6)  # to itself
    assert told["count"] == 7 and told["reference_count"] == 8 and told["picture_format"] == "png"
    low, high = told["intervals"]["cmmd"]  # type: ignore[index]
    assert low < told["cmmd"] < high
    settings = told["protocol_settings"]
    assert settings["captions_sha256"] == captions_digest(captions)  # type: ignore[index]
    with pytest.raises(UserError, match="it is another list"):
        measured("--clip", tiny_clip, "--captions-sha256", "0" * 64)
    (coco / "val2014" / "COCO_val2014_000000000043.jpg").write_bytes(b"\xff\xd8 cut off")
    with pytest.raises(UserError, match=r"000000000043.jpg cannot be read as an image"):
        measured("--clip", tiny_clip)
    (coco / "made" / "000005.png").unlink()
    with pytest.raises(
        UserError, match=r"no image for caption 5\. .* has 6 images, and 7 are needed"
    ):
        measured("--clip", tiny_clip)


def test_same_noise_and_diversity_by_a_coco_protocol(
    tiny_teacher: Path, sd_style_teacher: Path, tiny_clip: Path, tiny_dinov2: Path, tmp_path: Path
) -> None:
    reference, dinov2 = save_pictures(tmp_path / "real", 6, 7), backbones.dinov2(str(tiny_dinov2))
    system, teacher = load_system(str(tiny_teacher), 1), load_system(str(tiny_teacher), 2)

    def measured(**more: object) -> dict[str, Any]:
        return evaluate_coco(
            system, SMALL, CAPTIONS, reference, tmp_path / "cache", num_resamples=20, **more
        )  # type: ignore[arg-type]

    told = measured(dinov2=dinov2, teacher=teacher, num_noises=3)
    seen = [
        dinov2.features(
            np.stack([fitted(p, 32) for p in run.render_any(one, CAPTIONS, 0, tmp_path, nth)])
        )
        for one, nth in ((system, 0), (system, 1), (system, 2), (teacher, 0))
    ]
    apart = [
        1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        for a, b in combinations(seen, 2)
    ]
    assert told["same_noise_distance"] == pytest.approx(
        apart[2].mean(), abs=1e-5
    )  # the first and the teacher's
    assert told["diversity"] == pytest.approx(np.mean([apart[0], apart[1], apart[3]]), abs=1e-5)
    assert (told["num_noises"], told["diversity_count"]) == (3, 7) and "dinov2" in told[
        "similarity"
    ]
    assert set(told["intervals"]) >= {"same_noise_distance", "diversity"}
    stand_in = backbones.Space("inception", "1", lambda p: p.astype(np.float32).mean((1, 2)))
    with pytest.raises(UserError, match="name --dinov2 or --clip for it"):
        measured(inception=stand_in, teacher=teacher)
    other = told | {"same_noise_teacher": "another"}
    with pytest.raises(UserError, match="held against different teachers"):
        check_same({"a": told, "b": other})
    check_same({"a": told, "b": {k: v for k, v in told.items() if k != "same_noise_teacher"}})


def test_few_pictures_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_few(2049, 2048, "more")
    assert not capsys.readouterr().err
    warn_few(2048, 2048, "take more")
    told = "2048 pictures for features of 2048 numbers: their covariance is singular, .* they are; take more"
    assert re.search(told, " ".join(capsys.readouterr().err.split()))


def test_an_out_that_is_a_folder_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is a folder; name the JSON file to write, such as .*metrics\.json"
    ):
        app(["evaluate", "pocket-student", "--out", str(tmp_path)], standalone_mode=False)


def test_unknown_names_tell_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["pocket-studnt"], "pocket-studnt is not a folder; did you mean 'pocket-student'"),
        (
            ["pocket-student", "--protocol", "coco2014"],
            "no such protocol: 'coco2014'; did you mean 'coco2014-30k'",
        ),
        (
            ["pocket-student", "--protocol", "coco2017-5k"],
            "needs --captions FILE and --reference FOLDER",
        ),
    ):
        with pytest.raises(UserError, match=message):
            app(["evaluate", *arguments, "--out", str(tmp_path / "m.json")], standalone_mode=False)


def test_inception_refuses_other_weights_and_is_torch_fidelitys(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="no weights file"):
        backbones.inception(weights)
    torch.save({"a": torch.zeros(1)}, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"has sha256 {digest}, expected 6726825d"):
        backbones.inception(weights)
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:
        with pytest.raises(UserError, match=r"pip install 'diffusion2gan\[eval\]'"):
            backbones.inception(weights, digest[:8])
        pytest.skip(f"torch-fidelity does not load: {error}")
    network = random_inception(module)
    torch.save(network.state_dict(), weights)
    space = backbones.inception(weights, hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    pictures = np.random.default_rng(8).integers(0, 255, (2, 299, 299, 3), np.uint8)
    expected = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))[0].numpy()
    assert space.features(pictures).shape == (2, 2048)
    np.testing.assert_allclose(space.features(pictures), expected, rtol=1e-4, atol=1e-5)
    assert space.features(pictures[:, :200, :200]).shape == (2, 2048)


def random_inception(module: object) -> torch.nn.Module:
    """torch-fidelity's network with random weights: what it wants to load is given to it as it is born."""
    kind = module.FeatureExtractorInceptionV3  # type: ignore[attr-defined]
    born: dict[str, torch.Tensor] = {}

    class Random(kind):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state: object, *args: object, **kwargs: object) -> None:
            born.update(self.state_dict())

    with torch.random.fork_rng():
        torch.manual_seed(9)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        return Random("inception", ["2048"], feature_extractor_weights_path=empty)
