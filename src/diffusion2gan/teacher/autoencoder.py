"""A VAE alone: pictures ↔ latents × scaling_factor. diffusers loads when a VAE does: a latent distance needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import read_json, sha256
from diffusion2gan.teacher.hub import find


def load_vae(name: str | Path, device: torch.device | str = "cpu") -> Any:
    """`pocket`, the folder of an AutoencoderKL or AutoencoderDC, or a pipeline's (or its hub id): frozen, float32.

    Safetensors only. Raises UserError where there is none, or it does not load.
    """
    folder = _folder(name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no VAE: neither config.json nor vae/config.json. Give `pocket`, or a folder that "
            "`AutoencoderKL.save_pretrained` or a pipeline's `save_pretrained` wrote."
        )
    from diffusers import AutoencoderDC, AutoencoderKL

    kind = (
        AutoencoderDC
        if read_json(folder / "config.json").get("_class_name") == "AutoencoderDC"
        else AutoencoderKL
    )
    try:
        vae = kind.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the VAE in {folder} does not load: {error}") from error
    return vae.eval().requires_grad_(False).to(device)


def vae_revision(name: str | Path) -> str:
    """A digest of its weights."""
    return sha256(_folder(name))[:16]


def _folder(name: str | Path) -> Path:
    folder = assets.folder("teacher") if str(name) == "pocket" else find(str(name))[0]
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def spatial_factor(vae: Any) -> int:
    """How many times smaller its latents are."""
    widths = (
        getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    )
    return int(2 ** (len(widths) - 1))


def num_latent_channels(vae: Any) -> int:
    return int(vae.config.latent_channels)


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents × scaling_factor, [B, C, h, w] float32: the posterior's mean. `images` [B, 3, H, W] in [−1, 1]."""
    encoded = vae.encode(images.to(vae.dtype))
    mean = (
        encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    )  # a DC-AE has no posterior
    shift, factor = normalisation(vae, mean)
    return ((mean - shift) * factor).float()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W], about [−1, 1], not clamped, of latents × scaling_factor; differentiable."""
    shift, factor = normalisation(vae, latents)
    return torch.as_tensor(
        vae.decode((latents / factor + shift).to(vae.dtype), return_dict=False)[0]
    )


def normalisation(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(shift, factor): latents are (the VAE's own − shift) · factor, as its stock pipelines have it."""
    config = vae.config
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        channel_mean, channel_std = (like.new_tensor(x).reshape(1, -1, 1, 1) for x in (mean, std))
        return channel_mean, config.scaling_factor / channel_std
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
