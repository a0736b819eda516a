"""A VAE alone: pictures ↔ latents × scaling_factor. diffusers loads when a VAE does: a latent distance needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.pocket import shipped
from diffusion2gan.runtime.files import sha256


def load_vae(name: str | Path, device: torch.device | str = "cpu") -> Any:
    """`pocket`, the folder of an AutoencoderKL, or of a pipeline with one: frozen, float32, safetensors only.

    Raises UserError where there is none, or it does not load.
    """
    folder = _folder(name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no VAE: neither config.json nor vae/config.json. Give `pocket`, or a folder that "
            "`AutoencoderKL.save_pretrained` or a pipeline's `save_pretrained` wrote."
        )
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the VAE in {folder} does not load: {error}") from error
    return vae.eval().requires_grad_(False).to(device)


def vae_revision(name: str | Path) -> str:
    """A digest of its weights."""
    return sha256(_folder(name))[:16]


def _folder(name: str | Path) -> Path:
    folder = shipped.folder("teacher") if str(name) == "pocket" else Path(name)
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def spatial_factor(vae: Any) -> int:
    """How many times smaller its latents are."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def num_latent_channels(vae: Any) -> int:
    return int(vae.config.latent_channels)


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Latents × scaling_factor, [B, C, h, w] float32: the posterior's mean. `images` [B, 3, H, W] in [−1, 1]."""
    mean = vae.encode(images.to(vae.dtype)).latent_dist.mean
    return ((mean - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor).float()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W], about [−1, 1], not clamped, of latents × scaling_factor; differentiable."""
    shifted = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    return vae.decode(shifted.to(vae.dtype), return_dict=False)[0]
