"""A student in one .safetensors file, in the layout that ComfyUI, A1111 and diffusers read.

Stable Diffusion and SDXL: all models of the pipeline under the names of the original code
(`model.diffusion_model.…`, `first_stage_model.…`, `cond_stage_model.…`), the reverse of diffusers'
`loaders/single_file_utils.py`. Flow models: the transformer alone, under diffusers' names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime import checkpoint
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.variants import V_PREDICTION_KEY, ZERO_SNR_KEY

Tensors = dict[str, Tensor]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

# diffusers' names → names in the original code
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def write_single_file(teacher: Teacher, student: Tensors, file: Path, dtype: torch.dtype) -> None:
    """Writes the pipeline with the student's weights to `file`, in `dtype`.

    Raises UserError if the models have a structure that the original code does not have, or a
    value that `dtype` cannot represent.
    """
    if teacher.family.network == "transformer":
        tensors = dict(student)
    else:
        pipeline = teacher.pipeline
        tensors = add_prefix(UNET_PREFIX, unet_tensors(student, teacher.network.config))
        vae = vae_tensors(pipeline.vae.state_dict(), len(pipeline.vae.config.up_block_types))
        tensors |= add_prefix(VAE_PREFIX, vae)
        tensors |= text_tensors(pipeline)

    # In one precision
    written: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.detach().to("cpu", dtype)
        written[name] = tensor.contiguous().clone()  # tensors may share memory, files may not
    problem = f"{file.name} cannot be written in {dtype}; nothing was written."
    checkpoint.check_finite(written, problem)

    # What the network predicts, which no other entry says
    if teacher.prediction_type == "v_prediction":
        written[V_PREDICTION_KEY] = torch.tensor([])
        if teacher.zero_snr:
            written[ZERO_SNR_KEY] = torch.tensor([])
    save_file(written, file, {"format": "pt"})


def add_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unet_tensors(tensors: Tensors, config: Any) -> Tensors:
    """A UNet's weights under the original names, without the prefix."""
    layers = config.layers_per_block
    if not isinstance(layers, int):
        raise UserError(
            f"--single-file: the UNet has {list(layers)} layers per block, but the original code "
            "has the same number in every block; leave the option out."
        )
    has_attention = {name.rpartition(".attentions.")[0] for name in tensors}

    renamed: Tensors = {}
    for name, tensor in tensors.items():
        renamed[_unet_name(name, layers, has_attention)] = tensor
    return renamed


def _unet_name(name: str, layers: int, has_attention: set[str]) -> str:
    for old, new in UNET_NAMES.items():
        if name.startswith(old + "."):
            return new + _resnet_name(name.removeprefix(old), ".resnets." in old)

    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(\..+)", name)
    if match is None:
        raise UserError(
            f"--single-file: the UNet has {name}, for which the original code of Stable Diffusion "
            "has no name; leave the option out."
        )
    side, block, kind, layer, rest = match.groups()
    index = int(block) * (layers + 1) + int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{int(block) * (layers + 1) + layers + 1}.0.op{rest[5:]}"
    if kind == "upsamplers":
        place = 2 if f"up_blocks.{block}" in has_attention else 1
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{place}{rest}"
    blocks = f"input_blocks.{index + 1}" if side == "down" else f"output_blocks.{index}"
    if kind == "attentions":
        return f"{blocks}.1{rest}"
    return f"{blocks}.0{_resnet_name(rest, True)}"


def _resnet_name(rest: str, is_resnet: bool) -> str:
    """The name of a layer of a residual block, `.LAYER.weight`."""
    layer = rest.split(".")[1]
    if is_resnet and layer in RESNET_NAMES:
        return rest.replace(layer, RESNET_NAMES[layer], 1)
    return rest


def vae_tensors(tensors: Tensors, num_blocks: int) -> Tensors:
    """An AutoencoderKL's weights under the original names, without the prefix."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        # The attention's layers are 1×1 convolutions there
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        for old, new in VAE_NAMES.items():
            name = name.replace(old, new)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        # Counted from the finest grid
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{num_blocks - 1 - int(m[1])}", name)
        renamed[name] = tensor
    return renamed


def text_tensors(pipeline: Any) -> Tensors:
    """The text encoders under the original names.

    SDXL's second encoder, and that of Stable Diffusion 2 (it has GELU), are OpenCLIP's.
    """
    first = clip_names(pipeline.text_encoder.state_dict())
    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        embedder = "conditioner.embedders."
        tensors = add_prefix(f"{embedder}0.transformer.", first)
        return tensors | add_prefix(f"{embedder}1.model.", open_clip_tensors(second.state_dict()))
    if pipeline.text_encoder.config.hidden_act == "gelu":
        return add_prefix("cond_stage_model.model.", open_clip_tensors(first))
    return add_prefix("cond_stage_model.transformer.", first)


def clip_names(tensors: Tensors) -> Tensors:
    """A CLIPTextModel's weights as `text_model.…`; transformers 5.6 and later has no prefix."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        has_prefix = name.startswith(("text_model.", "text_projection"))
        renamed[name if has_prefix else f"text_model.{name}"] = tensor
    return renamed


def open_clip_tensors(tensors: Tensors) -> Tensors:
    """A CLIP text model's weights under OpenCLIP's names."""
    renamed: Tensors = {}
    for name, tensor in clip_names(tensors).items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
            continue
        for old, new in OPEN_CLIP_NAMES.items():
            name = name.replace(old, new)
        renamed[name] = tensor

    # Queries, keys and values are one matrix there
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [
            renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")
        ]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return renamed


def kohya_lora(tensors: Tensors) -> Tensors:
    """A UNet's LoRA under the names of kohya's scripts, which ComfyUI and A1111 read too.

    `tensors` have diffusers' names, `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, and scale 1:
    alpha is the rank.
    """
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, end = name.partition(".lora_")
        module = "lora_unet_" + layer.replace(".", "_")
        direction = "down" if end.startswith("A") else "up"
        renamed[f"{module}.lora_{direction}.weight"] = tensor
        if direction == "down":
            renamed[f"{module}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return renamed
