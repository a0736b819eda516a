"""Teachers that are not a plain folder: one file, merged LoRAs, another VAE."""

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
from diffusion2gan.teacher.pipeline import Teacher

Folder = Callable[[str], Path]


def without_weights(folder: Path, component: str, to: Path) -> Path:
    """Copies a pipeline without the weights of one component."""
    shutil.copytree(folder, to)
    for weights in (to / component).glob("*.safetensors"):
        weights.unlink()
    return to


@pytest.mark.parametrize("name", ["flux_dev", "sd3"])
def test_transformer_in_a_single_file(name: str, family_folder: Folder, tmp_path: Path) -> None:
    original = load_teacher(str(family_folder(name)), resolution=64)
    save_file(original.network.state_dict(), tmp_path / "mine.safetensors")
    config = without_weights(family_folder(name), "transformer", tmp_path / "config")

    found = load_teacher(str(tmp_path / "mine.safetensors"), config=str(config), resolution=64)
    assert found.name == "mine.safetensors" and found.revision != original.revision
    weights = found.network.state_dict()
    for key, value in original.network.state_dict().items():
        assert torch.equal(value, weights[key]), key
    expected = original.encode(["two stars"]).prompt_embeds
    assert torch.equal(found.encode(["two stars"]).prompt_embeds, expected)


# diffusers' names → the names in Stable Diffusion's original code
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
VAE = {
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
    """The name of one of the tiny UNet's weights in Stable Diffusion's original code."""
    longest_first = sorted(UNET, key=len, reverse=True)
    block = next(block for block in longest_first if name.startswith(block + "."))
    weight = name.removeprefix(block + ".")
    if "resnets" in block:
        layer = weight.split(".")[0]
        weight = weight.replace(layer, RESNET[layer], 1)
    return f"model.diffusion_model.{UNET[block]}.{weight}"


def original_vae_name(name: str) -> str:
    """The name of one of the tiny VAE's weights in Stable Diffusion's original code."""
    for diffusers_name, original_name in VAE.items():
        name = name.replace(diffusers_name, original_name)
    for i in range(4):
        name = name.replace(f"down_blocks.{i}.", f"down.{i}.")
        name = name.replace(f"up_blocks.{i}.", f"up.{3 - i}.")  # counted from the finest
    return "first_stage_model." + name


def save_original_format(teacher: Teacher, file: Path) -> None:
    """Writes a Stable Diffusion checkpoint in the format of its original code.

    Most community checkpoints have it: `model.diffusion_model.…`, `first_stage_model.…` and
    `cond_stage_model.…`.
    """
    weights = {}
    for key, value in teacher.network.state_dict().items():
        weights[original_unet_name(key)] = value
    for key, value in teacher.vae.state_dict().items():
        is_attention = "attentions" in key and value.ndim == 2  # a 1×1 convolution there
        weights[original_vae_name(key)] = value[:, :, None, None] if is_attention else value
    for key, value in teacher.pipeline.text_encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.text_model.{name}"] = value
    save_file({key: value.contiguous() for key, value in weights.items()}, file)


def test_stable_diffusion_in_a_single_file_of_its_original_code(
    family_folder: Folder, tmp_path: Path
) -> None:
    original = load_teacher(str(family_folder("sd15")))
    save_original_format(original, tmp_path / "mine.safetensors")
    config = tmp_path / "config"
    shutil.copytree(family_folder("sd15"), config, ignore=shutil.ignore_patterns("*.safetensors"))

    found = load_teacher(str(tmp_path / "mine.safetensors"), config=str(config))
    for component in ("unet", "vae", "text_encoder"):
        weights = getattr(found.pipeline, component).state_dict()
        expected = getattr(original.pipeline, component).state_dict()
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(weights[key], value), (component, key)
    assert found.prediction_type == "epsilon"
    embeds = original.encode(["two stars"]).prompt_embeds
    assert torch.equal(found.encode(["two stars"]).prompt_embeds, embeds)


def test_single_file_needs_a_config_that_fits(family_folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_teacher(str(file))
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"contains only weights.*--teacher-config FOLDER"):
        load_teacher(str(file))
    for name in ("sd15", "sdxl", "sd3"):
        with pytest.raises(UserError, match="does not load as the Stable"):
            load_teacher(str(file), config=str(family_folder(name)))


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_with_a_conversion_command(ending: str) -> None:
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

    # W + scale · B·A, in the one layer that the LoRA has
    merged = load_teacher(str(folder), loras=f"{file}@0.5")
    layers = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
    name = next(key for key in layers if "lora_A" in key).removesuffix(".lora_A.weight")
    product = layers[f"{name}.lora_B.weight"] @ layers[f"{name}.lora_A.weight"]
    before, after = plain.network.state_dict(), merged.network.state_dict()
    assert before.keys() == after.keys()  # no adapter layers remain
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == [f"{name}.weight"]
    torch.testing.assert_close(
        after[changed[0]] - before[changed[0]], 0.5 * product, rtol=0, atol=1e-6
    )

    # Two LoRAs add up
    merged_twice = load_teacher(str(folder), loras=f"{file}@0.5,{file}@0.5")
    twice = merged_twice.network.state_dict()[changed[0]]
    torch.testing.assert_close(twice - before[changed[0]], product, rtol=0, atol=1e-6)

    # The revision depends on the LoRA and its scale
    full_scale = load_teacher(str(folder), loras=str(file))
    assert len({plain.revision, merged.revision, full_scale.revision}) == 3


def test_lora_for_another_base_model_is_refused(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = lora_for(DiffusionPipeline.from_pretrained(family_folder("sdxl")), tmp_path / "xl")
    layers = load_file(file)

    # Layers of other sizes
    wide = {key: value.repeat(2, 2) for key, value in layers.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="another base model"):
        load_teacher(str(family_folder("sd15")), loras=str(tmp_path / "wide.safetensors"))

    # Layers of another network
    foreign = {key.replace("unet.", "transformer."): value for key, value in layers.items()}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="another base model"):
        load_teacher(str(family_folder("sd15")), loras=str(tmp_path / "foreign.safetensors"))


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("nowhere.safetensors", "no such LoRA"),
        ("x@much", "must be a number, its scale, not 'much'"),
        ("a.pt", "pickle"),
    ],
)
def test_wrong_loras_are_reported(loras: str, message: str, family_folder: Folder) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=message):
        load_teacher(str(family_folder("sd15")), loras=loras)


def test_vae_is_replaced(family_folder: Folder, tmp_path: Path) -> None:
    torch.manual_seed(5)
    new_vae = kl(4, scaling_factor=0.5)
    new_vae.save_pretrained(tmp_path / "vae")
    plain = load_teacher(str(family_folder("sd15")))
    teacher = load_teacher(str(family_folder("sd15")), vae=str(tmp_path / "vae"))
    assert teacher.revision != plain.revision and isinstance(teacher.vae, AutoencoderKL)
    assert teacher.pipeline.vae is teacher.vae

    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = new_vae.decode(latents / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(teacher.decode(latents), expected)

    # A VAE of other latents is refused
    kl(16).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"16 channels and are 8 times.*4 channels and are 8 times"):
        load_teacher(str(family_folder("sd15")), vae=str(tmp_path / "wide"))
