"""Loading a teacher's folder, and its encoder and decoder against the stock pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusion2gan.errors import UserError
from diffusion2gan.teacher.families import FAMILIES
from diffusion2gan.teacher.loading import load_teacher

LONG = "a red ring and " * 30 + "a star"


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a diffusers pipeline: it is not a folder"):
        load_teacher(str(tmp_path / "nowhere"))


def test_folder_without_index_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"3", b'{"_class_name": "\xff"}'])
def test_broken_index_is_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model_index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model_index\.json does not name a pipeline class"):
        load_teacher(str(tmp_path))


def test_unsupported_class_is_reported_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "AuraFlowPipeline"}')
    with pytest.raises(UserError, match="AuraFlowPipeline") as raised:
        load_teacher(str(tmp_path))
    assert all(name in str(raised.value) for name in FAMILIES)


def test_missing_weights_are_reported(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="does not load"):
        load_teacher(str(folder))


def test_truncated_weights_are_reported(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="does not load"):
        load_teacher(str(folder))


def test_unknown_prediction_type_is_reported(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "flow"}))
    with pytest.raises(UserError, match=r"'flow'.*epsilon, v_prediction, sample"):
        load_teacher(str(folder))


def test_a_teacher_is_frozen_and_named_by_its_weights(
    tiny_teacher: Path, sd_style_teacher: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher))
    for module in (teacher.network, teacher.vae, teacher.pipeline.text_encoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())

    assert teacher.latent_shape == (4, 16, 16)
    assert teacher.image_size == (64, 64)
    assert teacher.spatial_factor == 4
    assert teacher.last_timestep == 999
    assert teacher.prediction_type == "v_prediction"

    assert load_teacher(str(tiny_teacher)).revision == teacher.revision
    assert load_teacher(str(sd_style_teacher)).prediction_type == "epsilon"


def test_prompts_are_encoded_like_diffusers_and_truncated_with_one_warning(
    tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load_teacher(str(tiny_teacher))
    prompts = ["a red ring", "", LONG, "ünïcode ✓ words"]

    # One warning for the long prompt, none later
    found = teacher.encode(prompts).prompt_embeds
    output = capsys.readouterr().err
    assert output.count("warning:") == 1
    assert "1 of 4 prompts" in output and "24 tokens" in output
    teacher.encode([LONG, LONG])
    assert "warning" not in capsys.readouterr().err

    # The embeddings of the stock pipeline
    stock = DiffusionPipeline.from_pretrained(tiny_teacher, safety_checker=None)
    expected, _ = stock.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(found, expected)

    # Words beyond the limit do not matter
    assert torch.equal(
        teacher.encode([LONG]).prompt_embeds, teacher.encode([LONG + " on blue"]).prompt_embeds
    )


def test_decode_matches_the_stock_pipeline(tiny_teacher: Path) -> None:
    teacher = load_teacher(str(tiny_teacher))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    stock = DiffusionPipeline.from_pretrained(tiny_teacher, safety_checker=None)
    with torch.no_grad():
        decoded = stock.vae.decode(latents / stock.vae.config.scaling_factor, return_dict=False)[0]
    expected = stock.image_processor.postprocess(decoded, output_type="pt")

    images = teacher.decode(latents)
    assert images.shape == (2, 3, 64, 64) and float(images.abs().max()) <= 1
    torch.testing.assert_close((images + 1) / 2, expected, rtol=0, atol=1e-6)
