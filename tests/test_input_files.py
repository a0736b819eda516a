"""Users' own files are read rightly, or refused in one paragraph; never wrongly in silence.

Each test is a kind of input that was once read wrongly. The values are calculated by hand or come
from the same weights in an ordinary file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.runner import assert_refused, run
from diffusers import (
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher.test_strict_loading import save_lora
from teacher.test_variants import save_original_format
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.evaluate.protocols import COCO2014, POCKET, describe_protocol, read_captions
from diffusion2gan.perceptual.images import open_labelled_images
from diffusion2gan.perceptual.images import read_image as read_labelled_image
from diffusion2gan.pipelines.image_folder import open_system, read_image
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.prompts import read_prompts
from diffusion2gan.recipe import load_recipe
from diffusion2gan.runtime.files import read_json, sha256
from diffusion2gan.runtime.images import READING, to_uint8
from diffusion2gan.serve.app import bypass_proxy
from diffusion2gan.teacher.autoencoder import load_vae
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.strict_loading import find_variant
from diffusion2gan.teacher.variants import parse_loras

Folder = Callable[[str], Path]
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 492265874\n"
)


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change_json(path: Path, **values: Any) -> None:
    """Sets values in a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def save_image(path: Path, pixels: Any, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def assert_same_weights(found: Teacher, expected: Teacher, convert: Any = None) -> None:
    for name, module in expected.pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            weights = getattr(found.pipeline, name).state_dict()
            for key, value in module.state_dict().items():
                value = convert(value) if convert else value
                assert torch.equal(weights[key], value), f"{name}: {key}"


# Links


def test_digest_follows_linked_folders(family_folder: Folder, tmp_path: Path) -> None:
    folder = copy_of(family_folder("sd15"), tmp_path / "teacher")
    plain = sha256(folder)

    # The same files behind a link: the same digest
    shutil.move(folder / "unet", tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    assert sha256(folder) == plain == sha256(family_folder("sd15"))
    first = load_teacher(str(folder))

    # Retargeted: another digest, so another set of pairs
    other = copy_of(tmp_path / "unet", tmp_path / "other_unet")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    (folder / "unet").unlink()
    (folder / "unet").symlink_to(other)
    assert load_teacher(str(folder)).revision != first.revision

    # A link to a folder above is not followed, and a link to a file is read
    (folder / "up").symlink_to(folder.parent)
    (folder / "unet").unlink()
    (folder / "unet").mkdir()
    for path in (tmp_path / "unet").iterdir():
        (folder / "unet" / path.name).symlink_to(path)
    assert sha256(folder) == plain


def test_pairs_of_a_retargeted_link_are_not_one_set(family_folder: Folder, tmp_path: Path) -> None:
    folder = copy_of(family_folder("sd15"), tmp_path / "teacher")
    shutil.move(folder / "unet", tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    (tmp_path / "prompts.txt").write_text("a star\n")
    command = ("pairs", "--teacher", folder, "--prompts", tmp_path / "prompts.txt", "--count", 1)
    command = (*command, "--num-inference-steps", 1, "--out", tmp_path / "pairs")
    assert run(*command).code == 0

    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert_refused(run(*command), 2, "revision")


def test_images_in_linked_folders_are_found(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            save_image(tmp_path / "data" / name / f"{i}.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "linked").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "linked" / name).mkdir()
        (tmp_path / "linked" / name / "more").symlink_to(tmp_path / "data" / name)
    assert len(open_labelled_images(tmp_path / "linked").labels) == 4

    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "more").symlink_to(tmp_path / "data" / "red")
    assert set(open_system(str(tmp_path / "pictures")).files) == {0, 1}  # type: ignore[union-attr]


# Lines of text


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_ends_only(end: str, tmp_path: Path) -> None:
    prompts = ["a star", "a\u2028ring", "two\u0085stars", "three\x0bgreen\x0c squares\x1c"]
    path = tmp_path / "prompts.txt"
    path.write_bytes(("\ufeff" + end.join(prompts) + end).encode())
    assert read_prompts(path) == [prompt.strip() for prompt in prompts]
    assert read_captions(path, 4)[0] == "a star"


def test_byte_order_marks_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(b"\xef\xbb\xbfbatch_size = 3\n")
    assert load_recipe(str(recipe)).batch_size == 3


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein grüner Stern\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_prompts(path)


def test_json_suffix_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "captions.JSON"
    row = {"image_id": 1, "id": 1, "caption": "a star"}
    path.write_text(json.dumps({"annotations": [row]}))
    assert read_captions(path, 1) == ["a star"]


def test_home_folder_in_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("teacher", "teacher_config", "vae", "init_from", "perceptual")
    recipe = load_recipe("pocket", [f"{name}=~/mine" for name in names])
    assert all(getattr(recipe, name) == str(tmp_path / "mine") for name in names)
    (tmp_path / "mine.safetensors").touch()
    assert parse_loras("~/mine.safetensors@0.5") == [(tmp_path / "mine.safetensors", 0.5)]
    (tmp_path / "mine.txt").write_text("a star\n")
    assert read_prompts(Path("~/mine.txt")) == ["a star"]

    # An option with = is not expanded by the shell
    result = run("generate", "pocket-student", "--prompt", "a star", "--out=~/star.png")
    assert result.code == 0 and (tmp_path / "star.png").is_file()


# Images


def both_readers(path: Path) -> list[np.ndarray]:
    labelled = read_labelled_image(path, "image").permute(1, 2, 0).numpy()
    return [read_image(path), labelled]


def test_16_bit_images_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129], [32768, 65407, 65535]], np.uint16)
    expected = np.array([[0, 0, 1], [128, 255, 255]])  # divided by 257 and rounded
    for suffix in (".png", ".tif"):
        path = save_image(tmp_path / f"grey{suffix}", values)
        assert Image.open(path).mode == "I;16"
        for pixels in both_readers(path):
            assert np.array_equal(pixels, np.stack([expected] * 3, -1))


def test_32_bit_images_are_refused(tmp_path: Path) -> None:
    path = save_image(tmp_path / "float.tif", np.full((2, 2), 0.5, np.float32))
    with pytest.raises(UserError, match="32 bits, whose range is not known"):
        read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((2, 3, 3), np.uint8)
    upright[0, 0] = 255  # the top left corner is white
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save_image(tmp_path / "photo.png", np.ascontiguousarray(stored), exif=exif)
    for pixels in both_readers(path):
        assert np.array_equal(pixels, upright)


def test_transparency_is_over_white(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    expected = [[[255] * 3, [0] * 3, [204] * 3]]  # 255·(1 − alpha)
    for found in both_readers(save_image(tmp_path / "rgba.png", pixels)):
        assert np.array_equal(found, expected)

    # A palette with a transparent entry
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=0)
    for found in both_readers(tmp_path / "palette.png"):
        assert np.array_equal(found, [[[255] * 3, [0, 0, 255]]])


def test_protocol_states_how_images_are_read() -> None:
    options: dict[str, Any] = {"captions": ["a"], "seed": 0, "weights": {}}
    assert describe_protocol(COCO2014, **options)["protocol_settings"]["reading"] == READING
    # The pocket protocol has read no files so far: its digest stays
    assert "reading" not in describe_protocol(POCKET, **options)["protocol_settings"]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for i in range(2):
            save_image(tmp_path / name / f"{i}.png", np.zeros((4, 4, 3), np.uint8))
            (tmp_path / name / f"._{i}.png").write_bytes(b"\x00\x05\x16\x07")
    assert len(open_labelled_images(tmp_path).labels) == 4
    assert len(open_system(str(tmp_path / "red")).files) == 2  # type: ignore[union-attr]


def test_hidden_files_do_not_change_a_digest(family_folder: Folder, tmp_path: Path) -> None:
    folder = copy_of(family_folder("sd15"), tmp_path / "teacher")
    (folder / "unet" / "._diffusion_pytorch_model.safetensors").write_bytes(b"\x00\x05\x16\x07")
    assert sha256(folder) == sha256(family_folder("sd15"))


def test_nan_is_not_a_black_image(family_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="not numbers"):
        to_uint8(torch.full((1, 3, 2, 2), math.nan))

    # A VAE that overflows: its sums are infinite, and their difference is not a number
    folder = copy_of(family_folder("sd15"), tmp_path / "teacher")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= 1e38
    save_file(weights, file, {"format": "pt"})
    image = tmp_path / "image.png"
    result = run("generate", folder, "--prompt", "a star", "--out", image)
    assert_refused(result, 1, "not numbers (NaN) in float32")
    assert not image.exists()

    # Nothing is cached
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\n")
    out = tmp_path / "report"
    result = run("compare", "--system", f"a={folder}@1", "--prompts", prompts, "--out", out)
    assert_refused(result, 1, "not numbers")
    assert not list(tmp_path.rglob("*.safetensors.*"))
    assert not [path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"]


# Single files


def in_fp8(weights: dict[str, Tensor], suffix: str, rows: bool) -> dict[str, Tensor]:
    """ComfyUI's fp8 layout: matrices divided by their largest value over 448, and the scales."""
    scaled = {}
    for key, value in weights.items():
        if value.ndim != 2 or not key.endswith(".weight"):
            scaled[key] = value
            continue
        largest = value.abs().amax(1, keepdim=True) if rows else value.abs().amax()
        scale = largest.float().clamp(min=1e-6) / 448
        scaled[key] = (value / scale).to(torch.float8_e4m3fn)
        scaled[key.removesuffix(".weight") + suffix] = scale.flatten() if rows else scale
        scaled[key.removesuffix("weight") + "scale_input"] = torch.ones(())
    scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return scaled


def scaled_values(scaled: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    values = {}
    for key, value in scaled.items():
        scale = scaled.get(key.removesuffix(".weight") + suffix)
        values[key] = value.float() if scale is None else value.float() * scale.view(-1, 1)
    return values


@pytest.mark.parametrize(("suffix", "rows"), [(".scale_weight", False), (".weight_scale", True)])
def test_fp8_weights_are_multiplied_by_their_scales(
    suffix: str, rows: bool, family_folder: Folder, tmp_path: Path
) -> None:
    file = tmp_path / "fp8.safetensors"

    # A transformer, in diffusers' names
    config = family_folder("sd3")
    weights = load_file(config / "transformer" / "diffusion_pytorch_model.safetensors")
    scaled = in_fp8(weights, suffix, rows)
    expected = scaled_values(scaled, suffix)
    save_file(scaled, file)
    found = load_teacher(str(file), config=str(config)).network.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in weights)
    assert max(float((found[key] - value).abs().max()) for key, value in weights.items()) < 0.02

    # Stable Diffusion, in its original names
    original = load_teacher(str(family_folder("sd15")))
    save_original_format(original, file)
    save_file(in_fp8(load_file(file), suffix, rows), file)
    found = load_teacher(str(file), config=str(family_folder("sd15"))).network.state_dict()
    for key, value in original.network.state_dict().items():
        assert float((found[key] - value).abs().max()) < 0.02, key


def test_other_quantised_weights_are_refused(family_folder: Folder, tmp_path: Path) -> None:
    config, file = family_folder("sd3"), tmp_path / "int8.safetensors"
    weights = load_file(config / "transformer" / "diffusion_pytorch_model.safetensors")
    name = next(key for key, value in weights.items() if value.ndim == 2)
    weights[name] = weights[name].to(torch.int8)
    weights[name.removesuffix(".weight") + ".weight_scale"] = torch.ones(())
    save_file(weights, file)
    with pytest.raises(UserError, match="is in int8: it is quantised in a way that is not support"):
        load_teacher(str(file), config=str(config))


def original_file(family_folder: Folder, path: Path, **entries: Tensor) -> Path:
    save_original_format(load_teacher(str(family_folder("sd15"))), path)
    save_file({**load_file(path), **entries}, path)
    return path


def test_v_prediction_key_of_a_single_file(family_folder: Folder, tmp_path: Path) -> None:
    mark = torch.tensor([])
    config = str(family_folder("sd15"))
    file = original_file(family_folder, tmp_path / "v.safetensors", v_pred=mark)
    teacher = load_teacher(str(file), config=config)
    assert teacher.prediction_type == "v_prediction" and not teacher.zero_snr
    assert teacher.alpha_bar(999) == load_teacher(config).alpha_bar(999)

    original_file(family_folder, file, v_pred=mark, ztsnr=mark)
    teacher = load_teacher(str(file), config=config)
    assert teacher.prediction_type == "v_prediction" and teacher.zero_snr
    assert teacher.steps(4)[0].timestep == 999

    # Alone it contradicts ε, and beside v it completes it
    original_file(family_folder, file, ztsnr=mark)
    with pytest.raises(UserError, match=r"zero terminal SNR.*predicts ε"):
        load_teacher(str(file), config=config)
    teacher = load_teacher(str(file), config=str(family_folder("sd21")))
    assert teacher.prediction_type == "v_prediction" and teacher.zero_snr

    # EDM's noise levels
    original_file(family_folder, file, **{"edm_vpred.sigma_max": torch.tensor(120.0)})
    with pytest.raises(UserError, match="EDM's noise levels"):
        load_teacher(str(file), config=config)


def test_prediction_in_a_files_metadata(family_folder: Folder, tmp_path: Path) -> None:
    file = original_file(family_folder, tmp_path / "v.safetensors")
    for stated, config in (("v", "sd15"), ("epsilon", "sd21")):
        save_file(load_file(file), file, {"modelspec.prediction_type": stated})
        with pytest.raises(UserError, match=r"says in its metadata that it predicts"):
            load_teacher(str(file), config=str(family_folder(config)))
        other = {"sd15": "sd21", "sd21": "sd15"}[config]
        load_teacher(str(file), config=str(family_folder(other)))


# Schedulers


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EDMEulerScheduler(), "not given by betas"),
        (EDMDPMSolverMultistepScheduler(), "not given by betas"),
        (FlowMatchEulerDiscreteScheduler(), "a flow model's"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "continuous"),
        (EulerDiscreteScheduler(sigma_min=0.002, sigma_max=120.0), "continuous"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_noise_levels_of_other_formulas_are_refused(
    scheduler: Any, reason: str, family_folder: Folder, tmp_path: Path
) -> None:
    folder = copy_of(family_folder("sdxl"), tmp_path / "teacher")
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    name = type(scheduler).__name__
    change_json(folder / "model_index.json", scheduler=["diffusers", name])
    for load in (load_teacher, load_system):
        with pytest.raises(UserError, match=f"is {name}, and its noise levels are {reason}"):
            load(str(folder))
    with pytest.raises(UserError, match=reason):
        load_system(f"sdxl={folder}")


def test_flow_model_with_a_diffusion_scheduler_is_refused(
    family_folder: Folder, tmp_path: Path
) -> None:
    folder = copy_of(family_folder("sd3"), tmp_path / "teacher")
    shutil.rmtree(folder / "scheduler")
    EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    change_json(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    with pytest.raises(UserError, match="is a flow model, whose noise levels it does not have"):
        load_teacher(str(folder))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_too_many_steps_are_refused(name: str, family_folder: Folder, tmp_path: Path) -> None:
    folder = family_folder(name)
    teacher = load_teacher(str(folder))
    assert teacher.steps(999)[0].timestep == 999
    for load in (lambda: teacher.steps(1000), lambda: load_system(str(folder), 1000)):
        with pytest.raises(UserError, match=r"1000 steps do not fit.*Use 999 steps or fewer"):
            load()
    with pytest.raises(UserError, match="1001 steps do not fit"):
        teacher.steps(1001)

    # Nothing is written
    (tmp_path / "prompts.txt").write_text("a star\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--solver", "ddim", "--count", 1)
    steps = ("--num-inference-steps", 1000, "--out", tmp_path / "pairs")
    assert_refused(run("pairs", "--teacher", folder, *options, *steps), 2, "1000 steps do not fit")
    assert not (tmp_path / "pairs").exists()


# Layouts


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd3"])
@pytest.mark.parametrize("shards", [pytest.param("5GB", marks=pytest.mark.slow), "20KB"])
def test_folder_of_a_variant(name: str, shards: str, family_folder: Folder, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(family_folder(name)).to(torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size=shards)
    assert list(tmp_path.glob("unet/*.fp16*" if name != "sd3" else "transformer/*.fp16*"))
    found, expected = load_teacher(str(tmp_path)), load_teacher(str(family_folder(name)))
    assert_same_weights(found, expected, lambda value: value.half().float())
    assert load_vae(str(tmp_path)).dtype == torch.float32
    load_system(str(tmp_path), 1)


def test_weights_without_a_variant_come_first(family_folder: Folder, tmp_path: Path) -> None:
    folder = copy_of(family_folder("sd15"), tmp_path / "teacher")
    pipeline = DiffusionPipeline.from_pretrained(folder).to(torch.float16)
    pipeline.save_pretrained(folder, variant="fp16")
    assert_same_weights(load_teacher(str(folder)), load_teacher(str(family_folder("sd15"))))


def test_several_variants_and_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"in \.bin files only.*pickles"):
        find_variant(tmp_path)
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.fp16.safetensors").touch()
    assert find_variant(tmp_path) == "fp16"
    (tmp_path / "diffusion_pytorch_model.non_ema.safetensors").touch()
    with pytest.raises(UserError, match="several variants"):
        find_variant(tmp_path)
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()
    assert find_variant(tmp_path) is None


@pytest.mark.parametrize(
    "prefix", [pytest.param("module.", marks=pytest.mark.slow), "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_removed(
    prefix: str, family_folder: Folder, tmp_path: Path
) -> None:
    def add_prefix(source: Path, target: Path) -> None:
        weights = {prefix + key: value for key, value in load_file(source).items()}
        save_file(weights, target, {"format": "pt"})

    # A component of a folder, in shards as well
    sd15 = load_teacher(str(family_folder("sd15")))
    folder = tmp_path / "teacher"
    DiffusionPipeline.from_pretrained(family_folder("sd15")).save_pretrained(
        folder, max_shard_size="50KB"
    )
    for file in folder.glob("*/*.safetensors"):
        add_prefix(file, file)
    for path in folder.glob("*/*.index.json"):
        weight_map = json.loads(path.read_text())["weight_map"]
        change_json(path, weight_map={prefix + key: value for key, value in weight_map.items()})
    assert_same_weights(load_teacher(str(folder)), sd15)

    # Single files of a UNet and of a transformer
    file = original_file(family_folder, tmp_path / "unet.safetensors")
    add_prefix(file, file)
    assert_same_weights(load_teacher(str(file), config=str(family_folder("sd15"))), sd15)
    sd3 = family_folder("sd3")
    file = tmp_path / "transformer.safetensors"
    add_prefix(sd3 / "transformer" / "diffusion_pytorch_model.safetensors", file)
    assert_same_weights(load_teacher(str(file), config=str(sd3)), load_teacher(str(sd3)))


# Files that are not there, or damaged


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_git_lfs_pointers_are_named(name: str, family_folder: Folder, tmp_path: Path) -> None:
    folder = copy_of(family_folder("sd15"), tmp_path / "teacher")
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(UserError, match=f"{name} is not the file itself but a Git LFS pointer"):
        load_teacher(str(folder))


def test_git_lfs_pointers_of_other_files_are_named(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = str(family_folder("sd15"))
    for name in ("mine.safetensors", "image.png", "prompts.txt"):
        (tmp_path / name).write_text(LFS_POINTER)
    message = "is not the file itself but a Git LFS pointer"
    with pytest.raises(UserError, match=message):
        load_teacher(str(tmp_path / "mine.safetensors"), config=config)
    with pytest.raises(UserError, match=message):
        load_teacher(config, loras=str(tmp_path / "mine.safetensors"))
    with pytest.raises(UserError, match=message):
        read_image(tmp_path / "image.png")
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "prompts.txt")

    # A pointer to a file that is not read does not matter
    folder = copy_of(family_folder("sd15"), tmp_path / "teacher")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text(LFS_POINTER)
    load_teacher(str(folder))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux_dev"])
def test_tokenizer_without_a_limit_is_refused(
    name: str, family_folder: Folder, tmp_path: Path
) -> None:
    folder = copy_of(family_folder(name), tmp_path / "teacher")
    tokenizers = ["tokenizer", "tokenizer_2"] if name in ("sdxl", "sd3") else ["tokenizer"]
    for tokenizer in tokenizers:
        path = folder / tokenizer / "tokenizer_config.json"
        limit = json.loads(path.read_text())["model_max_length"]
        change_json(path, model_max_length=None)
        with pytest.raises(UserError, match=f'{tokenizer} has no.*"model_max_length": 77'):
            load_teacher(str(folder), resolution=64)
        change_json(path, model_max_length=limit)
    load_teacher(str(folder), resolution=64)


# Names


def test_folder_names_may_contain_equals_and_plus(
    family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_of(family_folder("sd15"), Path("lr=1e-4"))
    assert open_system("lr=1e-4", 1).name == "lr=1e-4"
    assert load_system("lr=1e-4", 1).name == "lr=1e-4"
    assert load_system("sd15=lr=1e-4", 1).name == "sd15=lr=1e-4"

    Path("a+b=c").mkdir()
    save_image(Path("a+b=c") / "0.png", np.zeros((4, 4, 3), np.uint8))
    assert open_system("a+b=c").name == "a+b=c"
    assert open_system("gigagan=a+b=c").name == "gigagan"

    copy_of(family_folder("sdxl"), Path("sdxl+vae"))
    with pytest.raises(UserError, match=r"missing\.safetensors is not a weights file"):
        load_system("sdxl-lightning=sdxl+vae+missing.safetensors")


def test_lora_paths_may_contain_commas_and_at(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = family_folder("sd15")
    files = [tmp_path / "a,b.safetensors", tmp_path / "a@1" / "c@2.safetensors"]
    files[1].parent.mkdir()
    save_lora(folder, files[0])
    shutil.copyfile(files[0], files[1])
    both = f"{files[0]}@0.5, {files[1]}"
    assert parse_loras(both) == [(files[0], 0.5), (files[1], 1.0)]

    expected = load_teacher(str(folder), loras=f"{files[0]}@1.5").network.state_dict()
    found = load_teacher(str(folder), loras=both).network.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"no such LoRA: .*a@1/d\.safetensors"):
        load_teacher(str(folder), loras=str(tmp_path / "a@1" / "d.safetensors"))


def test_published_system_by_hub_id(
    family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--org--name"
    shutil.copytree(family_folder("sdxl"), model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    system = load_system("sdxl-turbo=org/name")
    assert system.revision == load_system(f"sdxl-turbo={family_folder('sdxl')}").revision
    with pytest.raises(UserError, match="org/other is not a folder, and as a hub id it is not in"):
        load_system("sdxl-turbo=org/other")


def test_serve_does_not_ask_a_proxy_for_its_own_page(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "")
    bypass_proxy("0.0.0.0")
    assert os.environ["no_proxy"].split(",")[0] == "example.org"
    with httpx.Client() as client:
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            # httpx chooses a transport per URL; None is no proxy
            transport = client._transport_for_url(httpx.URL(f"http://{host}:7860"))
            assert transport is client._transport, host
        proxied = client._transport_for_url(httpx.URL("http://elsewhere.org"))
        assert proxied is not client._transport


# Messages


def test_other_kinds_of_adapters_are_named(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for part, kind in (("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr"), ("oft_blocks", "an OFT")):
        save_file({f"{layer}.{part}": torch.zeros(8, 2)}, tmp_path / "mine.safetensors")
        with pytest.raises(UserError, match=f"is {kind}, not a LoRA") as raised:
            load_teacher(str(family_folder("sd15")), loras=str(tmp_path / "mine.safetensors"))
        assert "base model" not in str(raised.value)


def test_damaged_loras_are_no_other_models(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.safetensors").write_bytes(b"damaged")
    for name in ("empty", "mine.safetensors"):
        with pytest.raises(UserError, match="does not load") as raised:
            load_teacher(str(family_folder("sd15")), loras=str(tmp_path / name))
        assert "base model" not in str(raised.value)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_lora_of_which_one_module_fits_is_refused(
    layout: str, family_folder: Folder, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder, file = family_folder("sd15"), tmp_path / "lora.safetensors"
    save_lora(folder, file)
    weights = load_file(file)
    if layout == "kohya":
        kohya = {}
        for key, value in weights.items():
            name, _, end = key.removeprefix("unet.").partition(".lora_")
            module = "lora_unet_" + name.replace(".", "_")
            kohya[f"{module}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = value
            kohya[f"{module}.alpha"] = torch.tensor(2.0)
        weights = kohya
        save_file(weights, file)
        load_teacher(str(folder), loras=str(file))

    # Layers of a larger network
    modules = sorted({key.rsplit(".", 2 if layout == "diffusers" else 1)[0] for key in weights})
    changed = {}
    for key, value in weights.items():
        first = modules[0].removesuffix(".lora_down").removesuffix(".lora_up")
        changed[
            key
            if key.startswith(first)
            else key.replace("blocks_", "blocks_9").replace("blocks.", "blocks.9")
        ] = value
    save_file(changed, file)
    with pytest.raises(UserError, match="the LoRA"):
        load_teacher(str(folder), loras=str(file))
