"""The regression losses against float64 closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.distill.losses import build_distance, mse, pseudo_huber
from diffusion2gan.perceptual.augment import BatchRows
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.pocket import models
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.loading import load_teacher

A, B = torch.randn(2, 5, 4, 6, 7, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def new_generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def random_network(in_channels: int, num_dropped_pools: int) -> tuple[VGG, list[torch.Tensor]]:
    """A small perceptual network and its heads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = VGG(in_channels, (8, 8, 8, 8, 8), num_dropped_pools)
        heads = [torch.rand(8) for _ in range(5)]
    return vgg, heads


def random_latents(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, batch_size, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return a, b


def test_mse_matches_its_definition() -> None:
    expected = ((A.double() - B.double()) ** 2).flatten(1).sum(1) / (4 * 6 * 7)
    torch.testing.assert_close(mse(A, B).double(), expected, rtol=1e-6, atol=0)

    distance = build_distance(Recipe(loss="mse"), CPU)
    assert torch.equal(distance(A, B, new_generator()), mse(A, B))


@pytest.mark.parametrize("c", [0.001, 0.03, 10.0])
def test_pseudo_huber_matches_its_definition(c: float) -> None:
    n = 4 * 6 * 7
    squared_norm = ((A.double() - B.double()) ** 2).flatten(1).sum(1)
    expected = ((squared_norm + c**2 * n).sqrt() - c * n**0.5) / n**0.5
    torch.testing.assert_close(pseudo_huber(A, B, c).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(pseudo_huber(A, A, c), torch.zeros(5))

    distance = build_distance(Recipe(loss="pseudo_huber", pseudo_huber_c=c), CPU)
    assert torch.equal(distance(A, B, new_generator()), pseudo_huber(A, B, c))


def test_gradient_of_pseudo_huber_is_zero_at_equal_latents() -> None:
    a = B.clone().requires_grad_()
    pseudo_huber(a, B, 0.03).sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_perceptual_losses_follow_the_recipe(tmp_path: Path) -> None:
    vgg, heads = random_network(4, 2)
    LatentLPIPS(vgg, heads).save_pretrained(tmp_path)
    a, b = random_latents(3)

    plain = build_distance(Recipe(loss="latent_lpips", perceptual=str(tmp_path)), CPU)
    assert torch.equal(plain(a, b, new_generator()), LatentLPIPS(vgg, heads)(a, b))

    recipe = Recipe(
        loss="e_latent_lpips",
        perceptual=str(tmp_path),
        transforms="geometric+cutout",
        num_draws=2,
        resampling="oversampled",
        transform_share=0.5,
    )
    ensembled = build_distance(recipe, CPU)
    expected = ELatentLPIPS(vgg, heads, num_draws=2, resampling="oversampled", transform_share=0.5)
    assert torch.equal(ensembled(a, b, new_generator()), expected(a, b, new_generator()))
    bilinear = build_distance(recipe.model_copy(update={"resampling": "bilinear"}), CPU)
    assert not torch.equal(ensembled(a, b, new_generator()), bilinear(a, b, new_generator()))


@pytest.mark.parametrize("loss", ["mse", "pseudo_huber", "latent_lpips", "e_latent_lpips"])
def test_rows_of_a_batch_have_the_distances_that_they_have_in_it(loss: str, tmp_path: Path) -> None:
    vgg, heads = random_network(4, 2)
    LatentLPIPS(vgg, heads).save_pretrained(tmp_path)
    a, b = random_latents(4)
    distance = build_distance(
        Recipe.model_validate({"loss": loss, "perceptual": str(tmp_path)}), CPU
    )

    expected = distance(a, b, new_generator())
    for rows in (slice(0, 2), slice(2, 4)):
        found = distance(a[rows], b[rows], new_generator(), BatchRows(rows, 4))
        torch.testing.assert_close(found, expected[rows])


def test_pixel_lpips_decodes_with_the_vae_of_the_teacher(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    vgg, heads = random_network(3, 0)
    LatentLPIPS(vgg, heads).save_pretrained(tmp_path)
    teacher = load_teacher(str(tiny_teacher))
    a, b = random_latents(2)

    recipe = Recipe(loss="pixel_lpips", perceptual=str(tmp_path))
    distance = build_distance(recipe, CPU, teacher)
    expected = PixelLPIPS(vgg, heads, teacher.vae)
    assert torch.equal(distance(a, b, new_generator()), expected(a, b))

    # Another scaling factor changes the decoded images
    vae = teacher.vae
    vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    with_pocket_vae = PixelLPIPS(vgg, heads, models.vae())
    assert not torch.equal(distance(a, b, new_generator()), with_pocket_vae(a, b))
