"""Regression losses between the student's and the teacher's latents.

Every loss is a distance: an object called `distance(a, b, generator, rows)` → [B].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion2gan.perceptual import decoder_features, teacher_features
from diffusion2gan.perceptual.augment import BatchRows
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.perceptual.weights import check_fits
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.autoencoder import spatial_factor
from diffusion2gan.teacher.pipeline import Teacher


class Distance(Protocol):
    """The distance between each of the latents `a` and `b`, both [B, C, h, w]: [B].

    Random transforms are drawn from `generator`. With `rows`, `a` and `b` are these rows of a
    larger batch, and get the transforms that they would get in it. Deterministic distances ignore
    both.
    """

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
    """[B] (√(‖a−b‖² + c²·n) − c·√n) / √n, with n elements per sample.

    Song & Dhariwal 2023, section 3.3, divided by √n.
    """
    return (mse(a, b) + c**2).sqrt() - c


class MSE:
    """`mse` as a distance."""

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None = None,
        rows: BatchRows | None = None,
    ) -> Tensor:
        return mse(a, b)


@dataclass(frozen=True)
class PseudoHuber:
    """`pseudo_huber` as a distance."""

    c: float

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        generator: torch.Generator | None = None,
        rows: BatchRows | None = None,
    ) -> Tensor:
        return pseudo_huber(a, b, self.c)


def build_distance(
    recipe: Recipe, device: torch.device, teacher: Teacher | None = None
) -> Distance:
    """The recipe's regression loss.

    The `teacher` decodes latents for pixel_lpips and provides the features of perceptual =
    "teacher" or "decoder"; the other losses do not need it. Raises UserError if there is no such
    perceptual network, or if it reads other latents than the teacher's.
    """
    # Losses without a network
    if recipe.loss == "mse":
        return MSE()
    if recipe.loss == "pseudo_huber":
        return PseudoHuber(recipe.pseudo_huber_c)

    # The random transforms of e_latent_lpips
    ensemble: dict[str, Any] = {
        "transforms": recipe.transforms,
        "num_draws": recipe.num_draws,
        "resampling": recipe.resampling,
        "transform_share": recipe.transform_share,
    }

    # On features of the teacher or of its VAE's decoder
    if recipe.perceptual in ("teacher", "decoder") and recipe.loss != "pixel_lpips":
        assert teacher is not None, f"perceptual = {recipe.perceptual!r} needs the teacher"
        source = teacher_features if recipe.perceptual == "teacher" else decoder_features
        bfloat16 = recipe.precision == "bfloat16"
        if recipe.loss == "latent_lpips":
            return source.plain_distance(teacher, bfloat16=bfloat16)
        return source.ensembled_distance(teacher, ensemble, bfloat16=bfloat16)

    # LPIPS on the decoded images
    if recipe.loss == "pixel_lpips":
        assert teacher is not None, "pixel_lpips needs the teacher's VAE"
        check_fits(recipe.perceptual, 3, 1, teacher.name)
        return PixelLPIPS.from_pretrained(recipe.perceptual, vae=teacher.vae).to(device)

    # LPIPS on latents
    if teacher is not None:
        factor = spatial_factor(teacher.vae)
        check_fits(recipe.perceptual, teacher.latent_shape[0], factor, teacher.name)
    if recipe.loss == "latent_lpips":
        return LatentLPIPS.from_pretrained(recipe.perceptual).to(device)
    return ELatentLPIPS.from_pretrained(recipe.perceptual, **ensemble).to(device)
