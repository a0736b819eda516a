"""Metrics against closed forms, scipy's matrix square root, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import metrics


def features(n: int, d: int, seed: int) -> np.ndarray:
    """[n, d] correlated numbers with a mean of their own."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / math.sqrt(d) + rng.standard_normal(d)


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as printed in Heusel et al. 2017, by a general matrix square root."""
    mu_a, mu_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(np.sum((mu_a - mu_b) ** 2) + np.trace(cov_a + cov_b - 2 * np.real(root)))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (64, 300, 32), (40, 40, 2)])
def test_frechet_distance_is_scipys(n: int, m: int, d: int) -> None:
    a, b = features(n, d, 1), features(m, d, 2)
    assert metrics.frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(10, 14, 40), (2, 3, 16), (12, 200, 24), (200, 12, 24)])
def test_frechet_distance_is_scipys_with_fewer_pictures_than_features(n: int, m: int, d: int) -> None:
    a, b = features(n, d, 3), features(m, d, 4)
    # singular covariances: the trace of the root from the eigenvalues of Σa^½ Σb Σa^½, which are real
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False))
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ np.cov(b, rowvar=False) @ root).clip(0)
    inner = inner[inner > inner.max() * 1e-12]  # rounding of the zero ones would count by its root
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    expected -= 2 * np.sqrt(inner).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (6, 30)])
def test_frechet_distance_of_a_set_to_itself_is_zero(n: int, d: int) -> None:
    a = features(n, d, 5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (6, 30)])
def test_frechet_distance_of_a_moved_set_is_the_squared_shift(n: int, d: int) -> None:
    a, shift = features(n, d, 6), np.linspace(-1, 2, d)
    assert metrics.frechet_distance(a, a + shift) == pytest.approx(float(shift @ shift), rel=1e-9)


def test_frechet_distance_invariances() -> None:
    a, b = features(90, 10, 7), features(70, 10, 8)
    distance = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    rng = np.random.default_rng(9)
    assert metrics.frechet_distance(rng.permutation(a), rng.permutation(b)) == pytest.approx(distance, rel=1e-9)
    turn = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    assert metrics.frechet_distance(a @ turn + 3, b @ turn + 3) == pytest.approx(distance, rel=1e-9)
    assert metrics.frechet_distance(2 * a, 2 * b) == pytest.approx(4 * distance, rel=1e-9)


def test_frechet_distance_of_scaled_gaussians() -> None:
    """b = s·a about the same mean: Σb = s²Σa, so the distance is (s − 1)² tr Σa."""
    a = features(120, 9, 10)
    b = a.mean(0) + 1.7 * (a - a.mean(0))
    assert metrics.frechet_distance(a, b) == pytest.approx(0.7**2 * a.var(0, ddof=1).sum(), rel=1e-9)


def test_frechet_distance_of_gaussians_by_their_parameters() -> None:
    """Large samples of N(0, diag s²) and N(m, diag t²): |m|² + Σ(s − t)²."""
    rng = np.random.default_rng(11)
    s, t, m = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 0.5]), np.array([0.3, 0.0, -0.4])
    a, b = rng.standard_normal((200_000, 3)) * s, rng.standard_normal((200_000, 3)) * t + m
    assert metrics.frechet_distance(a, b) == pytest.approx(0.25 + 2.0, abs=0.03)


def test_frechet_distance_takes_float32_and_needs_two_rows() -> None:
    a, b = features(50, 6, 12).astype(np.float32), features(50, 6, 13).astype(np.float32)
    assert metrics.frechet_distance(a, b) == pytest.approx(by_scipy(a.astype(float), b.astype(float)), rel=1e-7)
    with pytest.raises(UserError, match=r"two pictures a side, got 1 and 50; raise --count"):
        metrics.frechet_distance(a[:1], b)


def test_cosine_is_the_angles() -> None:
    angles = np.array([0.0, 0.4, math.pi / 2, 2.0, math.pi])
    a = np.tile([3.0, 0.0], (5, 1))
    b = 0.2 * np.stack([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(metrics.cosine(a, b), np.cos(angles), atol=1e-12)
    np.testing.assert_allclose(metrics.cosine(np.zeros((2, 3)), np.ones((2, 3))), 0)


def test_clip_score_is_the_mean_of_corresponding_rows() -> None:
    a, b = features(20, 7, 14), features(20, 7, 15)
    rows = [1 - scipy.spatial.distance.cosine(x, y) for x, y in zip(a, b, strict=True)]
    assert metrics.clip_score(a, b) == pytest.approx(np.mean(rows), rel=1e-12)
    assert metrics.clip_score(a, 5 * a) == pytest.approx(1, abs=1e-12)
    assert metrics.clip_score(a, b[::-1]) != pytest.approx(metrics.clip_score(a, b), abs=1e-6)


def test_same_noise_distance() -> None:
    rng = np.random.default_rng(16)
    a, b = rng.standard_normal((3, 4, 5)), rng.standard_normal((3, 4, 5))
    rows = [scipy.spatial.distance.cosine(a[i, p], b[i, p]) for i in range(3) for p in range(4)]
    assert metrics.same_noise_distance(a, b) == pytest.approx(np.mean(rows), rel=1e-12)
    assert metrics.same_noise_distance(a, 2 * a) == pytest.approx(0, abs=1e-12)
    assert metrics.same_noise_distance(a, -a) == pytest.approx(2, abs=1e-12)
    order = [2, 0, 1]
    assert metrics.same_noise_distance(a[order], b[order]) == pytest.approx(metrics.same_noise_distance(a, b))
    assert metrics.same_noise_distance(a[order], b) != pytest.approx(metrics.same_noise_distance(a, b), abs=1e-6)


def test_share() -> None:
    assert metrics.share([True, False, True, True]) == 0.75
    assert metrics.share([False]) == 0 and metrics.share([True]) == 1
    assert math.isnan(metrics.share([]))
