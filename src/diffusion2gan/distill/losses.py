"""Regression losses between the student's and the teacher's latents: pure functions `(a, b) → [B]`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.recipe import Recipe


class Distance(Protocol):
    """`(a, b, generator)` → [B]. With `part` = (rows, size), a and b are those rows of a batch of that size."""

    def __call__(
        self, a: Tensor, b: Tensor, generator: torch.Generator, part: tuple[slice, int] | None = None
    ) -> Tensor: ...


def mse(a: Tensor, b: Tensor) -> Tensor:
    """[B] mean squared difference."""
    return (a - b).square().mean((1, 2, 3))


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """[B] √(‖a−b‖² + c²·n) − c·√n, divided by √n, n numbers a sample (Song & Dhariwal 2023, section 3.3)."""
    return (mse(a, b) + c**2).sqrt() - c


def distance_of(recipe: Recipe, device: torch.device, vae: nn.Module | None = None) -> Distance:
    """The recipe's loss as one function of (student's latents, teacher's latents, generator).

    `vae`, the teacher's own, decodes for pixel_lpips; the others do without.
    """
    match recipe.loss:
        case "mse":
            return lambda a, b, generator, part=None: mse(a, b)
        case "pseudo_huber":
            return lambda a, b, generator, part=None: pseudo_huber(a, b, recipe.pseudo_huber_c)
        case "latent_lpips":
            plain: LatentLPIPS = LatentLPIPS.from_pretrained(recipe.perceptual).to(device)
            return lambda a, b, generator, part=None: plain(a, b)
        case "e_latent_lpips":
            ensembled: ELatentLPIPS = ELatentLPIPS.from_pretrained(
                recipe.perceptual, transforms=recipe.transforms, num_draws=recipe.num_draws
            ).to(device)
            return lambda a, b, generator, part=None: ensembled(a, b, generator, part)
        case "pixel_lpips":
            assert vae is not None, "pixel_lpips decodes: give the teacher's vae"
            pixels: PixelLPIPS = PixelLPIPS.from_pretrained(recipe.perceptual, vae=vae).to(device)
            return lambda a, b, generator, part=None: pixels(a, b)
