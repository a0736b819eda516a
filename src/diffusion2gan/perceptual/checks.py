"""Checks of a distance's two inputs before anything is computed.

Shapes, channels and precision are known on the host and always checked. Values are checked on a CPU
only, and not inside a compiled graph, because reading a value from a GPU waits for the device. On a
GPU, a NaN in the input gives a NaN in the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.progress import console

# Plausible standard deviations of latents × scaling_factor. Unscaled: SD 5.5, SDXL 7.7, FLUX 2.8.
LIKELY_STD = (0.4, 2.5)
IMAGE_CHANNELS = 3  # the VAEs of the supported families have latents of four or more


def describe_inputs(channels: int) -> str:
    """`images` or `latents`, for messages."""
    return "images" if channels == IMAGE_CHANNELS else "latents"


def check_shapes(a: Tensor, b: Tensor, channels: int, smallest_side: int) -> None:
    """Raises UserError unless both are [B, channels, h, w] with sides that the pools can halve."""
    if a.shape != b.shape:
        raise UserError(
            f"the two {describe_inputs(channels)} differ in shape: {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )

    if a.ndim != 4 or a.shape[1] != channels:
        remedy = "use the network that was fitted to the same VAE"
        if channels == IMAGE_CHANNELS:
            remedy = "it compares images; for latents, decode them first, as PixelLPIPS does"
        raise UserError(
            f"inputs of shape {tuple(a.shape)}: this network reads [B, {channels}, h, w]; {remedy}"
        )

    height, width = a.shape[2:]
    if min(height, width) < smallest_side:
        raise UserError(
            f"{describe_inputs(channels)} of {height}×{width}: this network needs "
            f"{smallest_side}×{smallest_side}"
        )


def check_size(size: int, factor: int, smallest_side: int) -> None:
    """Raises UserError if images of side `size` give latents that the pools cannot halve.

    `factor` is the VAE's downsampling factor, 1 for pixels.
    """
    smallest_size = factor * smallest_side
    if size % factor != 0 or size < smallest_size:
        multiple = f"a multiple of {factor}, " if factor > 1 else ""
        raise UserError(f"--size {size}: {multiple}{smallest_size} or more, is needed")


def check_precision(dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError for a float16 network on a CPU.

    float16 latents are accepted: they are converted to float32.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError(
            "the distance's network is in float16 on a CPU; use .float() or .bfloat16() on a CPU"
        )


def check_finite(a: Tensor, b: Tensor) -> None:
    """Raises UserError if either contains a NaN or an infinity."""
    for name, x in (("first", a), ("second", b)):
        if torch.isfinite(x).all():
            continue
        bad_rows = [i for i, row in enumerate(x) if not torch.isfinite(row).all()]
        raise UserError(
            f"the {name} {describe_inputs(x.shape[1])} are not finite (NaN or infinity) in batch "
            f"rows {bad_rows[:8]}"
        )


def warn_if_unscaled(x: Tensor) -> bool:
    """Prints a warning if latents look unscaled; returns whether it did.

    Images in [−1, 1] may have any standard deviation.
    """
    if x.shape[1] == IMAGE_CHANNELS:
        return False
    std = float(x.detach().float().std())
    low, high = LIKELY_STD
    if low <= std <= high:
        return False
    console.print(
        f"warning: these latents have a standard deviation of {std:.2g}, far from 1. The distance "
        "expects the VAE's latents × scaling_factor, as used in diffusers pipelines. (Shown "
        "once.)",
        soft_wrap=True,
    )
    return True
