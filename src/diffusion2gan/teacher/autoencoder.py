"""A VAE without its pipeline: images ↔ latents × scaling_factor.

diffusers is imported when a VAE is loaded, because a distance between latents does not need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import read_json, sha256
from diffusion2gan.teacher import strict_loading
from diffusion2gan.teacher.hub import find_model

SUPPORTED_CLASSES = ("AutoencoderKL", "AutoencoderDC")


def load_vae(name: str | Path, device: torch.device | str = "cpu") -> Any:
    """Loads a frozen VAE in float32, from safetensors only.

    `name`: `pocket`, the folder of an AutoencoderKL or AutoencoderDC, or a pipeline (folder or hub
    id), of which the VAE is taken. Raises UserError if there is no VAE, it is of another class or
    it does not load.
    """
    folder = find_vae(name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} contains no VAE: it has neither config.json nor vae/config.json. Give "
            "`pocket`, or a folder that `AutoencoderKL.save_pretrained` or a pipeline's "
            "`save_pretrained` wrote."
        )
    from diffusers import AutoencoderDC, AutoencoderKL

    with strict_loading.translated_errors(f"the VAE in {folder}"):
        class_name = read_json(folder / "config.json").get("_class_name", SUPPORTED_CLASSES[0])
    if class_name not in SUPPORTED_CLASSES:
        raise UserError(
            f"the VAE in {folder} is of the class {class_name}; supported are "
            f"{' and '.join(SUPPORTED_CLASSES)}."
        )
    vae_class = AutoencoderDC if class_name == "AutoencoderDC" else AutoencoderKL
    vae = strict_loading.load_model(vae_class, folder, low_cpu_mem_usage=False)
    return vae.eval().requires_grad_(False).to(device)


def vae_revision(name: str | Path) -> str:
    """A digest of a VAE's weights."""
    return sha256(find_vae(name))[:16]


def find_vae(name: str | Path) -> Path:
    """The folder of a VAE, or of the VAE inside a pipeline's folder."""
    folder = assets.folder("teacher") if str(name) == "pocket" else find_model(str(name))[0]
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def spatial_factor(vae: Any) -> int:
    """Pixels per latent along each side."""
    widths = getattr(vae.config, "encoder_block_out_channels", None)
    widths = widths or vae.config.block_out_channels
    return int(2 ** (len(widths) - 1))


def num_latent_channels(vae: Any) -> int:
    return int(vae.config.latent_channels)


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents × scaling_factor [B, C, h, w] in float32 from `images` [B, 3, H, W] in [−1, 1].

    The mean of the posterior; AutoencoderDC has no posterior, only latents.
    """
    encoded = vae.encode(images.to(vae.dtype))
    mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    shift, factor = normalisation(vae, mean)
    return ((mean - shift) * factor).float()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] from latents × scaling_factor; about [−1, 1], not clamped.

    Differentiable.
    """
    shift, factor = normalisation(vae, latents)
    raw = (latents / factor + shift).to(vae.dtype)
    return torch.as_tensor(vae.decode(raw, return_dict=False)[0])


def normalisation(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(shift, factor) such that latents = (raw VAE latents − shift) · factor, as in diffusers.

    Numbers, or tensors [1, C, 1, 1] on the device of `like` if the VAE has statistics per channel.
    """
    config = vae.config
    mean = getattr(config, "latents_mean", None)
    std = getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        channel_mean = like.new_tensor(mean).reshape(1, -1, 1, 1)
        channel_std = like.new_tensor(std).reshape(1, -1, 1, 1)
        return channel_mean, config.scaling_factor / channel_std
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
