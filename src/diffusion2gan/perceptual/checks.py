"""What a distance asks of its two inputs before it computes anything.

Shapes, channels and precision are known on the host: they are checked always. Numbers are looked at only on a CPU, and
not inside a compiled graph, since on a GPU a look waits for the device: there NaN in is NaN out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.progress import console

LIKELY_STD = (0.4, 2.5)  # of latents × scaling_factor; unscaled ones: SD 5.5, SDXL 7.7, FLUX 2.8


def check_shapes(a: Tensor, b: Tensor, channels: int, smallest_side: int) -> None:
    """Raises UserError where the two differ, or are not [B, channels, h, w] with sides that the pools can halve."""
    if a.shape != b.shape:
        raise UserError(f"the two latents differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim != 4 or a.shape[1] != channels:
        raise UserError(
            f"latents of shape {tuple(a.shape)}: this network reads [B, {channels}, h, w]; use the network of the same "
            "VAE"
        )
    if min(a.shape[2:]) < smallest_side:
        raise UserError(
            f"latents of {a.shape[2]}×{a.shape[3]}: this network needs {smallest_side}×{smallest_side}"
        )


def check_size(size: int, factor: int, smallest_side: int) -> None:
    """Raises UserError where pictures of that side become no latents, `factor` times smaller, that pools can halve."""
    if size % factor or size < factor * smallest_side:
        multiple = f"a multiple of {factor}, " if factor > 1 else ""
        raise UserError(f"--size {size}: {multiple}{factor * smallest_side} or more, is needed")


def check_precision(dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError for a float16 network on a CPU. float16 latents are welcome: they are raised to float32."""
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError(
            "the distance's network is in float16 on a CPU; use .float() or .bfloat16() there"
        )


def check_finite(a: Tensor, b: Tensor) -> None:
    """Raises UserError where either holds a NaN or an infinity."""
    for name, x in (("first", a), ("second", b)):
        if not torch.isfinite(x).all():
            bad = [i for i, row in enumerate(x) if not torch.isfinite(row).all()]
            raise UserError(
                f"the {name} latents are not finite (NaN or infinity) in batch rows {bad[:8]}"
            )


def warn_unscaled(x: Tensor) -> bool:
    """Says that latents look unscaled, if they do; returns whether it said so."""
    std = float(x.detach().float().std())
    if LIKELY_STD[0] <= std <= LIKELY_STD[1]:
        return False
    console.print(
        f"warning: these latents have a standard deviation of {std:.2g}, far from 1. The distance expects the VAE's "
        "latents × scaling_factor, as diffusers pipelines hold them (said once).",
        soft_wrap=True,
    )
    return True
