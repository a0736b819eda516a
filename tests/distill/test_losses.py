"""The regression losses against float64 closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.distill.losses import build_distance, mse, pseudo_huber
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.pocket import models
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.loading import load_teacher

A, B = torch.randn(2, 5, 4, 6, 7, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_mse() -> None:
    expected = ((A.double() - B.double()) ** 2).flatten(1).sum(1) / (4 * 6 * 7)
    torch.testing.assert_close(mse(A, B).double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(build_distance(Recipe(loss="mse"), CPU)(A, B, rng()), mse(A, B))


@pytest.mark.parametrize("c", [0.001, 0.03, 10.0])
def test_pseudo_huber(c: float) -> None:
    n = 4 * 6 * 7
    norm2 = ((A.double() - B.double()) ** 2).flatten(1).sum(1)
    expected = ((norm2 + c**2 * n).sqrt() - c * n**0.5) / n**0.5
    torch.testing.assert_close(pseudo_huber(A, B, c).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(pseudo_huber(A, A, c), torch.zeros(5))
    recipe = Recipe(loss="pseudo_huber", pseudo_huber_c=c)
    assert torch.equal(build_distance(recipe, CPU)(A, B, rng()), pseudo_huber(A, B, c))


def test_pseudo_hubers_gradient_is_finite_at_zero() -> None:
    a = B.clone().requires_grad_()
    pseudo_huber(a, B, 0.03).sum().backward()
    assert a.grad is not None and torch.equal(a.grad, torch.zeros_like(a))


def test_the_recipe_chooses_the_perceptual_loss(tmp_path: Path) -> None:
    vgg, heads = VGG(4, (8, 8, 8, 8, 8), 2), [torch.rand(8) for _ in range(5)]
    LatentLPIPS(vgg, heads).save_pretrained(tmp_path)
    a, b = torch.randn(2, 3, 4, 16, 16)
    plain = build_distance(Recipe(loss="latent_lpips", perceptual=str(tmp_path)), CPU)
    assert torch.equal(plain(a, b, rng()), LatentLPIPS(vgg, heads)(a, b))
    recipe = Recipe(
        loss="e_latent_lpips", perceptual=str(tmp_path), transforms="blit+cutout", num_draws=2
    )
    expected = ELatentLPIPS(vgg, heads, transforms="blit+cutout", num_draws=2)(a, b, rng())
    assert torch.equal(build_distance(recipe, CPU)(a, b, rng()), expected)


def test_pixel_lpips_decodes_with_the_teachers_vae(tiny_teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vgg, heads, teacher = (
        VGG(3, (8, 8, 8, 8, 8), 0),
        [torch.rand(8) for _ in range(5)],
        load_teacher(str(tiny_teacher)),
    )
    vae = teacher.vae
    LatentLPIPS(vgg, heads).save_pretrained(tmp_path)
    a, b = torch.randn(2, 2, 4, 16, 16)
    distance = build_distance(Recipe(loss="pixel_lpips", perceptual=str(tmp_path)), CPU, teacher)
    assert torch.equal(distance(a, b, rng()), PixelLPIPS(vgg, heads, vae)(a, b))
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    assert not torch.equal(distance(a, b, rng()), PixelLPIPS(vgg, heads, models.vae())(a, b))
