"""Regression losses between the student's and the teacher's latents: pure functions `(a, b) → [B]`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from diffusion2gan.perceptual.augment import BatchRows
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.perceptual.teacher_features import ensembled_distance, plain_distance
from diffusion2gan.perceptual.weights import check_fits
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.autoencoder import spatial_factor
from diffusion2gan.teacher.pipeline import Teacher


class Distance(Protocol):
    """`distance(a, b, generator, rows)` → [B]. With `rows`, a and b are these rows of a larger batch."""

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None = None,
        rows: BatchRows | None = None,
    ) -> Tensor: ...


def mse(a: Tensor, b: Tensor) -> Tensor:
    """[B] mean squared difference."""
    return (a - b).square().mean((1, 2, 3))


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """[B] √(‖a−b‖² + c²·n) − c·√n, divided by √n, n numbers a sample (Song & Dhariwal 2023, section 3.3)."""
    return (mse(a, b) + c**2).sqrt() - c


def build_distance(
    recipe: Recipe, device: torch.device, teacher: Teacher | None = None
) -> Distance:
    """The recipe's loss as one function of (student's latents, teacher's latents, generator).

    The `teacher` decodes for pixel_lpips and lends its features to perceptual = "teacher"; the others do without.
    Raises UserError where there is no such network, or it reads other latents than the teacher's.
    """
    if recipe.perceptual == "teacher" and recipe.loss in ("latent_lpips", "e_latent_lpips"):
        assert teacher is not None, "its features are asked for: give the teacher"
        return _of_teacher(recipe, teacher)
    if teacher is not None and "lpips" in recipe.loss:
        factor = 1 if recipe.loss == "pixel_lpips" else spatial_factor(teacher.vae)
        check_fits(
            recipe.perceptual, 3 if factor == 1 else teacher.latent_shape[0], factor, teacher.name
        )
    match recipe.loss:
        case "mse":
            return lambda a, b, generator=None, rows=None: mse(a, b)
        case "pseudo_huber":
            return lambda a, b, generator=None, rows=None: pseudo_huber(a, b, recipe.pseudo_huber_c)
        case "latent_lpips":
            return LatentLPIPS.from_pretrained(recipe.perceptual).to(device)
        case "e_latent_lpips":
            return ELatentLPIPS.from_pretrained(
                recipe.perceptual, transforms=recipe.transforms, num_draws=recipe.num_draws
            ).to(device)
        case "pixel_lpips":
            assert teacher is not None, "pixel_lpips decodes: give the teacher"
            return PixelLPIPS.from_pretrained(recipe.perceptual, vae=teacher.vae).to(device)


def _of_teacher(recipe: Recipe, teacher: Teacher) -> Distance:
    bfloat16 = recipe.precision == "bfloat16"
    if recipe.loss == "latent_lpips":
        return plain_distance(teacher, bfloat16=bfloat16)
    return ensembled_distance(teacher, recipe.transforms, recipe.num_draws, bfloat16=bfloat16)
