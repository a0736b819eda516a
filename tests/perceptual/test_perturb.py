"""Perturbations of latents against plain computations, and the measures of agreement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor

from diffusion2gan.perceptual import perturb as module
from diffusion2gan.perceptual.agreement import choice_agreement, gradient_cosine, rank_correlation
from diffusion2gan.perceptual.perturb import KINDS, blur, perturb, shift


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(seed: int = 0, size: int = 16) -> Tensor:
    return torch.randn(4, size, size, generator=rng(seed))


def perturbed(kind: str, strength: float, seed: int = 5) -> Tensor:
    return perturb(latents(), kind, strength, latents(1), latents(2), rng(seed))


def test_noise_has_a_standard_deviation_from_a_fiftieth_to_two() -> None:
    for strength, sigma in ((0.0, 0.02), (0.5, 0.2), (1.0, 2.0)):
        noise = perturbed("noise", strength) - latents()
        assert float(noise.std()) == pytest.approx(sigma, rel=0.05)


def test_blur_is_a_gaussian_filter_reflected_at_the_edges() -> None:
    x = latents()
    expected = ndimage.gaussian_filter(x.numpy(), 1.5, axes=(1, 2), mode="reflect", truncate=8)
    np.testing.assert_allclose(blur(x, 1.5).numpy(), expected, atol=2e-3)
    torch.testing.assert_close(blur(x, 0.0), x, rtol=0, atol=1e-5)


def test_shift_by_whole_pixels_moves_the_values() -> None:
    x = latents()
    right = shift(x, 3.0, 0.0)
    torch.testing.assert_close(right[:, :, :-3], x[:, :, 3:], rtol=0, atol=1e-5)
    down = shift(x, 2.0, math.pi / 2)
    torch.testing.assert_close(down[:, :-2], x[:, 2:], rtol=0, atol=1e-5)


def test_interpolation_ends_at_the_other_image_and_students_are_mixed_in() -> None:
    assert torch.equal(perturbed("interpolation", 1.0), latents(1))
    half = 0.5 * (latents() + latents(1))
    torch.testing.assert_close(perturbed("interpolation", 0.5), half)
    assert torch.equal(perturbed("student", 1.0), latents(2))


def test_a_patch_is_a_square_of_the_other_image() -> None:
    for strength, side in ((0.0, 1), (0.5, 8), (1.0, 16)):
        result = perturbed("patch", strength)
        changed = (result != latents()).all(0)
        assert int(changed.sum()) == side**2
        assert int(changed.any(0).sum()) == int(changed.any(1).sum()) == side
        assert torch.equal(result[:, changed], latents(1)[:, changed])


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbation_is_larger_the_stronger_and_depends_on_its_seed_alone(kind: str) -> None:
    distances = []
    for strength in (0.05, 0.9):
        result = perturbed(kind, strength)
        assert torch.equal(result, perturbed(kind, strength)) and result.shape == (4, 16, 16)
        distances.append(float((result - latents()).square().mean()))
    assert 0 < distances[0] < distances[1]
    with pytest.raises(ValueError, match="blurr"):
        perturbed("blurr", 0.5)
    assert set(module.WITHOUT_STUDENTS) == set(KINDS) - {"student"}


def test_rank_correlation_is_spearmans_with_equal_numbers_too() -> None:
    a, b = torch.randn(2, 50, generator=rng())
    b = (a + b).round()  # ties
    expected = stats.spearmanr(a.numpy(), b.numpy()).statistic
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-9)
    assert rank_correlation(a, a.exp()) == pytest.approx(1)


def test_choice_agreement_counts_every_pair_of_perturbations() -> None:
    a, b = torch.rand(2, 5, 4, generator=rng())
    a[0, 0] = a[0, 1]  # a tie counts half
    agreed = []
    for row in range(5):
        for i in range(4):
            for j in range(i):
                product = float((a[row, i] - a[row, j]) * (b[row, i] - b[row, j]))
                agreed.append(0.5 if product == 0 else float(product > 0))
    assert choice_agreement(a, b) == pytest.approx(sum(agreed) / len(agreed))
    assert choice_agreement(b, 2 * b) == 1 and choice_agreement(b, -b) == 0


def test_gradient_cosine_is_that_of_the_flattened_gradients() -> None:
    a, b = torch.randn(2, 3, 4, 5, 5, generator=rng())
    expected = [
        float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())
        for x, y in zip(a.double(), b.double(), strict=True)
    ]
    assert gradient_cosine(a, b).tolist() == pytest.approx(expected, abs=1e-6)
