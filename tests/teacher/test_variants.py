"""Teachers that are no plain folder: one file, merged LoRAs, another VAE."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_families import kl

from diffusion2gan.errors import UserError
from diffusion2gan.teacher.loading import load_teacher

Folder = Callable[[str], Path]


def without_weights(folder: Path, part: str, to: Path) -> Path:
    shutil.copytree(folder, to)
    for weights in (to / part).glob("*.safetensors"):
        weights.unlink()
    return to


@pytest.mark.parametrize("name", ["flux_dev", "sd3"])
def test_a_transformer_in_one_file(name: str, family_folder: Folder, tmp_path: Path) -> None:
    whole = load_teacher(str(family_folder(name)), resolution=64)
    save_file(whole.network.state_dict(), tmp_path / "mine.safetensors")
    config = without_weights(family_folder(name), "transformer", tmp_path / "config")
    found = load_teacher(str(tmp_path / "mine.safetensors"), config=str(config), resolution=64)
    weights = found.network.state_dict()
    assert all(
        torch.equal(value, weights[key]) for key, value in whole.network.state_dict().items()
    )
    assert found.name == "mine.safetensors" and found.revision != whole.revision
    assert torch.equal(
        found.encode(["two stars"]).prompt_embeds, whole.encode(["two stars"]).prompt_embeds
    )


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_PARTS = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
}


def original_unet_name(name: str) -> str:
    """The name that Stable Diffusion's own code gives a weight of the tiny UNet."""
    part = next(part for part in sorted(UNET, key=len, reverse=True) if name.startswith(part + "."))
    rest = name.removeprefix(part + ".")
    layer = rest.split(".")[0]
    rest = rest.replace(layer, RESNET[layer], 1) if "resnets" in part else rest
    return f"model.diffusion_model.{UNET[part]}.{rest}"


def original_vae_name(name: str) -> str:
    for part, theirs in VAE_PARTS.items():
        name = name.replace(part, theirs)
    for i in range(4):  # the decoder counts from the finest
        name = name.replace(f"up_blocks.{i}.", f"up.{3 - i}.").replace(
            f"down_blocks.{i}.", f"down.{i}."
        )
    return "first_stage_model." + name


def test_a_whole_stable_diffusion_in_its_own_codes_single_file(
    family_folder: Folder, tmp_path: Path
) -> None:
    """As community checkpoints come: `model.diffusion_model.…`, `first_stage_model.…`, `cond_stage_model.…`."""
    whole = load_teacher(str(family_folder("sd15")))
    weights = {original_unet_name(key): value for key, value in whole.network.state_dict().items()}
    for key, value in whole.vae.state_dict().items():
        attention = "attentions" in key and value.ndim == 2
        weights[original_vae_name(key)] = value[:, :, None, None] if attention else value
    for key, value in whole.pipeline.text_encoder.state_dict().items():
        weights["cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")] = (
            value
        )
    save_file(
        {key: value.contiguous() for key, value in weights.items()}, tmp_path / "mine.safetensors"
    )
    config = tmp_path / "config"
    shutil.copytree(family_folder("sd15"), config, ignore=shutil.ignore_patterns("*.safetensors"))
    found = load_teacher(str(tmp_path / "mine.safetensors"), config=str(config))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(t.pipeline, part).state_dict() for t in (found, whole))
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == [], part
    assert found.prediction_type == "epsilon"
    assert torch.equal(
        found.encode(["two stars"]).prompt_embeds, whole.encode(["two stars"]).prompt_embeds
    )


def test_a_single_file_needs_its_config_and_must_fit_it(
    family_folder: Folder, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_teacher(str(file))
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"holds weights alone.*--teacher-config FOLDER"):
        load_teacher(str(file))
    for name in ("sd15", "sdxl", "sd3"):
        with pytest.raises(UserError, match="does not load as the Stable"):
            load_teacher(str(file), config=str(family_folder(name)))


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_with_the_conversion(ending: str) -> None:
    with pytest.raises(UserError, match=r"is a pickle.*weights_only=True.*model\.safetensors"):
        load_teacher("model" + ending)


def lora_for(pipeline: Any, folder: Path, size: float = 0.1) -> Path:
    """A LoRA of rank 2 in diffusers' layout, for one attention layer of a UNet."""
    name = next(n for n, _ in pipeline.unet.named_modules() if n.endswith("attn1.to_q"))
    weight = pipeline.unet.state_dict()[f"{name}.weight"]
    generator = torch.Generator().manual_seed(0)
    layers = {
        f"{name}.lora_A.weight": torch.randn(2, weight.shape[1], generator=generator) * size,
        f"{name}.lora_B.weight": torch.randn(weight.shape[0], 2, generator=generator) * size,
    }
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def test_loras_are_merged_at_their_scale(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = family_folder("sd15")
    plain = load_teacher(str(folder))
    file = lora_for(plain.pipeline, tmp_path)
    merged = load_teacher(str(folder), loras=f"{file}@0.5")
    layers = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
    name = next(key for key in layers if "lora_A" in key).removesuffix(".lora_A.weight")
    product = layers[f"{name}.lora_B.weight"] @ layers[f"{name}.lora_A.weight"]
    before, after = plain.network.state_dict(), merged.network.state_dict()
    assert before.keys() == after.keys()  # nothing of peft is left
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == [f"{name}.weight"]
    torch.testing.assert_close(
        after[changed[0]] - before[changed[0]], 0.5 * product, rtol=0, atol=1e-6
    )
    twice = load_teacher(str(folder), loras=f"{file}@0.5,{file}@0.5").network.state_dict()[
        changed[0]
    ]
    torch.testing.assert_close(twice - before[changed[0]], product, rtol=0, atol=1e-6)
    assert (
        len({plain.revision, merged.revision, load_teacher(str(folder), loras=str(file)).revision})
        == 3
    )


def test_a_lora_of_another_base_is_refused(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = lora_for(DiffusionPipeline.from_pretrained(family_folder("sdxl")), tmp_path / "xl")
    layers = {key.replace("to_q.", "to_q."): value for key, value in load_file(file).items()}
    save_file(
        {key: value.repeat(2, 2) for key, value in layers.items()}, tmp_path / "wide.safetensors"
    )
    with pytest.raises(UserError, match="another base model"):
        load_teacher(str(family_folder("sd15")), loras=str(tmp_path / "wide.safetensors"))
    foreign = {key.replace("unet.", "transformer."): value for key, value in layers.items()}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="another base model"):
        load_teacher(str(family_folder("sd15")), loras=str(tmp_path / "foreign.safetensors"))
    for wrong, told in (
        ("nowhere.safetensors", "no such LoRA"),
        ("x@much", "its scale, a number"),
        ("a.pt", "pickle"),
    ):
        with pytest.raises(UserError, match=told):
            load_teacher(str(family_folder("sd15")), loras=wrong)


def test_another_vae_takes_its_place(family_folder: Folder, tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = kl(4, scaling_factor=0.5)
    other.save_pretrained(tmp_path / "vae")
    plain = load_teacher(str(family_folder("sd15")))
    teacher = load_teacher(str(family_folder("sd15")), vae=str(tmp_path / "vae"))
    assert teacher.revision != plain.revision and isinstance(teacher.vae, AutoencoderKL)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = other.decode(latents / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(teacher.decode(latents), expected)
    assert teacher.pipeline.vae is teacher.vae
    kl(16).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"4 channels and are 8 times smaller.*16 and 8"):
        load_teacher(str(family_folder("sd15")), vae=str(tmp_path / "wide"))
