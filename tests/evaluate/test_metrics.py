"""Metrics against closed forms, scipy's matrix square root, and invariances."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import metrics


def features(n: int, d: int, seed: int) -> np.ndarray:
    """[n, d] correlated numbers with a random mean."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, d))
    mixing = rng.standard_normal((d, d))
    return values @ mixing / math.sqrt(d) + rng.standard_normal(d)


def scipy_frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as printed in Heusel et al. 2017, by a general matrix square root."""
    mu_a, mu_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(np.sum((mu_a - mu_b) ** 2) + np.trace(cov_a + cov_b - 2 * np.real(root)))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (64, 300, 32), (40, 40, 2)])
def test_frechet_distance_matches_scipy(n: int, m: int, d: int) -> None:
    a, b = features(n, d, 1), features(m, d, 2)
    assert metrics.frechet_distance(a, b) == pytest.approx(scipy_frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(10, 14, 40), (2, 3, 16), (12, 200, 24), (200, 12, 24)])
def test_frechet_distance_matches_eigenvalues_with_fewer_images_than_features(
    n: int, m: int, d: int
) -> None:
    a, b = features(n, d, 3), features(m, d, 4)

    # Singular covariances: the trace of the root is that of the real eigenvalues of Σa^½ Σb Σa^½
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False))
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ np.cov(b, rowvar=False) @ root).clip(0)
    inner = inner[inner > inner.max() * 1e-12]  # the root would magnify the rounding of zeros

    expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected += a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    expected -= 2 * np.sqrt(inner).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (6, 30)])
def test_frechet_distance_of_a_set_to_itself_is_zero(n: int, d: int) -> None:
    a = features(n, d, 5)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("n", "d"), [(100, 8), (6, 30)])
def test_frechet_distance_of_a_shifted_set_is_the_squared_shift(n: int, d: int) -> None:
    a, shift = features(n, d, 6), np.linspace(-1, 2, d)
    assert metrics.frechet_distance(a, a + shift) == pytest.approx(float(shift @ shift), rel=1e-9)


def test_frechet_distance_is_symmetric_and_invariant_to_order_and_rotation() -> None:
    a, b = features(90, 10, 7), features(70, 10, 8)
    distance = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)

    rng = np.random.default_rng(9)
    assert metrics.frechet_distance(rng.permutation(a), rng.permutation(b)) == pytest.approx(
        distance, rel=1e-9
    )

    rotation = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    assert metrics.frechet_distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(
        distance, rel=1e-9
    )
    assert metrics.frechet_distance(2 * a, 2 * b) == pytest.approx(4 * distance, rel=1e-9)


def test_frechet_distance_of_scaled_gaussians() -> None:
    """b = s·a about the same mean: Σb = s²Σa, so the distance is (s − 1)² tr Σa."""
    a = features(120, 9, 10)
    b = a.mean(0) + 1.7 * (a - a.mean(0))
    assert metrics.frechet_distance(a, b) == pytest.approx(
        0.7**2 * a.var(0, ddof=1).sum(), rel=1e-9
    )


def test_frechet_distance_of_gaussians_matches_their_parameters() -> None:
    """Large samples of N(0, diag s²) and N(m, diag t²): |m|² + Σ(s − t)²."""
    rng = np.random.default_rng(11)
    s = np.array([1.0, 2.0, 0.5])
    t = np.array([2.0, 1.0, 0.5])
    m = np.array([0.3, 0.0, -0.4])
    a = rng.standard_normal((200_000, 3)) * s
    b = rng.standard_normal((200_000, 3)) * t + m
    assert metrics.frechet_distance(a, b) == pytest.approx(0.25 + 2.0, abs=0.03)


def test_frechet_distance_accepts_float32_and_needs_two_rows() -> None:
    a, b = features(50, 6, 12).astype(np.float32), features(50, 6, 13).astype(np.float32)
    assert metrics.frechet_distance(a, b) == pytest.approx(
        scipy_frechet_distance(a.astype(float), b.astype(float)), rel=1e-7
    )
    with pytest.raises(
        UserError, match=r"two images in each set, got 1 of .* and 50 of .*; use more images"
    ):
        metrics.frechet_distance(a[:1], b)


def test_cosine_similarity_matches_the_angles() -> None:
    angles = np.array([0.0, 0.4, math.pi / 2, 2.0, math.pi])
    a = np.tile([3.0, 0.0], (5, 1))
    b = 0.2 * np.stack([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(metrics.cosine_similarity(a, b), np.cos(angles), atol=1e-12)
    np.testing.assert_allclose(metrics.cosine_similarity(np.zeros((2, 3)), np.ones((2, 3))), 0)


def test_clip_score_is_the_mean_of_corresponding_rows() -> None:
    a, b = features(20, 7, 14), features(20, 7, 15)
    rows = [1 - scipy.spatial.distance.cosine(x, y) for x, y in zip(a, b, strict=True)]
    assert metrics.clip_score(a, b) == pytest.approx(np.mean(rows), rel=1e-12)
    assert metrics.clip_score(a, 5 * a) == pytest.approx(1, abs=1e-12)
    assert metrics.clip_score(a, b[::-1]) != pytest.approx(metrics.clip_score(a, b), abs=1e-6)


def test_same_noise_distance_is_the_mean_over_corresponding_patches() -> None:
    rng = np.random.default_rng(16)
    a, b = rng.standard_normal((3, 4, 5)), rng.standard_normal((3, 4, 5))
    rows = [scipy.spatial.distance.cosine(a[i, p], b[i, p]) for i in range(3) for p in range(4)]
    assert metrics.same_noise_distance(a, b) == pytest.approx(np.mean(rows), rel=1e-12)
    assert metrics.same_noise_distance(a, 2 * a) == pytest.approx(0, abs=1e-12)
    assert metrics.same_noise_distance(a, -a) == pytest.approx(2, abs=1e-12)

    # Images are compared with the image of the same index
    order = [2, 0, 1]
    assert metrics.same_noise_distance(a[order], b[order]) == pytest.approx(
        metrics.same_noise_distance(a, b)
    )
    assert metrics.same_noise_distance(a[order], b) != pytest.approx(
        metrics.same_noise_distance(a, b), abs=1e-6
    )


def test_accuracy_is_the_share_of_true_and_nan_without_answers() -> None:
    assert metrics.accuracy([True, False, True, True]) == 0.75
    assert metrics.accuracy([False]) == 0 and metrics.accuracy([True]) == 1
    assert math.isnan(metrics.accuracy([]))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 12), (10, 14, 40)])
def test_streamed_moments_give_the_same_frechet_distance(n: int, m: int, d: int) -> None:
    a, b = features(n, d, 20) + 100, features(m, d, 21) + 100
    chunks = [a[:3], a[3:4], a[4:]]
    for order in ((0, 1, 2), (2, 0, 1)):
        moments = [metrics.Moments.from_rows(chunks[i]) for i in order]
        streamed = moments[0] + moments[1] + moments[2]
        np.testing.assert_allclose(
            streamed.covariance(), np.cov(a, rowvar=False), rtol=1e-9, atol=1e-9
        )
        distance = metrics.frechet_distance_of_moments(streamed, metrics.Moments.from_rows(b))
        assert distance == pytest.approx(metrics.frechet_distance(a, b), rel=1e-5)


def test_kernel_distance_is_the_u_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(13, 6, 22), features(9, 6, 23) + 0.5

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """[len(x), len(y)] kernel values."""
        return (x @ y.T / 6 + 1) ** 3

    def mean_within(x: np.ndarray) -> float:
        """Over pairs of different rows."""
        different = ~np.eye(len(x), dtype=bool)
        return float(kernel(x, x)[different].mean())

    expected = mean_within(a) + mean_within(b) - 2 * kernel(a, b).mean()
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert metrics.kernel_distance(b, a[::-1]) == pytest.approx(expected, rel=1e-10)

    monkeypatch.setattr(metrics, "BLOCK", 4)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(UserError, match=r"two images in each set, got 1 of .* and 9 of"):
        metrics.kernel_distance(a[:1], b)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    # A set with itself: rows are compared with themselves across the sets, but not within one
    for seed in range(3):
        a = features(40, 5, seed)
        assert metrics.kernel_distance(a, a[::-1]) < 0

    rng = np.random.default_rng(24)
    draws = [metrics.kernel_distance(*rng.standard_normal((2, 30, 5))) for _ in range(200)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / math.sqrt(200)


def test_cmmd_matches_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(12, 6, 25), features(7, 6, 26)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))

    def mean_kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.exp(-scipy.spatial.distance.cdist(p, q, "sqeuclidean") / 200).mean())

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert metrics.cmmd(a, b) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "BLOCK", 5)
    assert metrics.cmmd(3 * a, b[::-1]) == pytest.approx(expected, rel=1e-9)
    assert metrics.cmmd(a, a) == pytest.approx(0, abs=1e-9)

    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])  # |x − y|² = 2
    assert metrics.cmmd(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)), rel=1e-12)


def manifold_from_definitions(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Precision, recall, density and coverage by their definitions, from a table of distances."""

    def radius(x: np.ndarray, k: int) -> np.ndarray:
        return np.sort(scipy.spatial.distance.cdist(x, x), axis=1)[
            :, k
        ]  # column 0 is the row itself

    table = scipy.spatial.distance.cdist(a, b)
    return {
        "precision": (table <= radius(b, 3)).any(1).mean(),
        "recall": (table <= radius(a, 3)[:, None]).any(0).mean(),
        "density": (table <= radius(b, 5)).sum(1).mean() / 5,
        "coverage": (table <= radius(b, 5)).any(0).mean(),
    }


def manifold_means(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    return {key: float(values.mean()) for key, values in vars(metrics.manifold(a, b)).items()}


@pytest.mark.parametrize(
    ("n", "m", "d", "shift"), [(60, 45, 3, 0.5), (45, 60, 12, 0.0), (30, 200, 2, 1.0)]
)
def test_manifold_matches_its_definitions(
    n: int, m: int, d: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = features(n + m, d, 27)
    a, b = 1.1 * both[:n] + shift, both[n:]
    expected = manifold_from_definitions(a, b)
    assert 0 < expected["coverage"] < 1 and expected["density"] > 0
    assert manifold_means(a, b) == pytest.approx(expected)
    rng = np.random.default_rng(29)
    assert manifold_means(rng.permutation(a) + 1e3, rng.permutation(b) + 1e3) == pytest.approx(
        expected
    )
    monkeypatch.setattr(metrics, "BLOCK", 7)
    assert manifold_means(a, b) == pytest.approx(expected)
    found = metrics.manifold(a, b)
    assert [len(x) for x in (found.precision, found.density)] == [n, n]
    assert [len(x) for x in (found.recall, found.coverage)] == [m, m]


def test_manifold_of_equal_distant_and_collapsed_sets() -> None:
    a = features(50, 4, 30)
    assert manifold_means(a, a) == {
        "precision": 1,
        "recall": 1,
        "density": pytest.approx(6 / 5, abs=0.5),
        "coverage": 1,
    }
    assert set(manifold_means(a, a + 1000).values()) == {0}

    # Collapsed onto one good image
    collapsed = np.tile(a[:1], (50, 1)) + 1e-6 * features(50, 4, 31)
    result = manifold_means(collapsed, a)
    assert result["precision"] == 1 and result["recall"] <= 0.1 and result["coverage"] < 0.5

    with pytest.raises(
        UserError, match=r"need at least 6 images in each set, got 5 of .* and 50 of"
    ):
        metrics.manifold(a[:5], a)


def test_manifold_matches_torch_fidelity_and_sklearn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    a, b = np.split(features(210, 6, 32), [120])
    a += 0.4

    radius = neighbors.NearestNeighbors(n_neighbors=6).fit(b).kneighbors(b)[0][:, 5]
    table = scipy.spatial.distance.cdist(a, b)
    result = manifold_means(a, b)
    assert 0.05 < result["recall"] < 0.95 and 0.05 < result["precision"] < 0.95
    assert result["density"] == pytest.approx((table <= radius).sum() / 5 / 120)
    assert result["coverage"] == pytest.approx((table <= radius).any(0).mean())

    fidelity = torch_fidelity("metric_prc")
    theirs = fidelity.prc_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), verbose=False
    )
    assert result["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert result["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


def torch_fidelity(module: str) -> Any:
    """A module of torch-fidelity; skips the test if it or its torchvision does not load."""
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError) as error:
        # A torchvision made for another torch raises RuntimeError
        pytest.skip(f"torch-fidelity does not load: {error}")


def test_kernel_and_frechet_distances_match_torch_fidelity() -> None:
    a, b = features(80, 6, 34), features(80, 6, 35) + 0.3
    all_rows = dict(kid_subsets=1, kid_subset_size=80, verbose=False)
    theirs = torch_fidelity("metric_kid").kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), **all_rows
    )
    assert metrics.kernel_distance(a, b) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-9
    )

    fid = torch_fidelity("metric_fid")
    stats = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*stats, verbose=False)
    assert metrics.frechet_distance(a, b) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-8
    )


def test_diversity_is_the_mean_over_pairs_with_any_distance() -> None:
    rng = np.random.default_rng(36)
    several = rng.standard_normal((5, 3, 4, 7))  # prompts, images, patches, width
    per_prompt = metrics.diversity(several)
    pairs = [
        metrics.same_noise_distance(several[2:3, i], several[2:3, j])
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert per_prompt.shape == (5,) and per_prompt[2] == pytest.approx(np.mean(pairs))
    assert metrics.diversity(several[:, ::-1]) == pytest.approx(per_prompt)
    assert metrics.diversity(np.repeat(several[:, :1], 3, axis=1)) == pytest.approx(0, abs=1e-12)

    # With another distance: L1
    l1 = metrics.diversity(several, lambda a, b: np.abs(a - b).sum((1, 2)))
    expected = [np.abs(several[0, i] - several[0, j]).sum() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert l1[0] == pytest.approx(sum(expected) / 3)

    with pytest.raises(UserError, match="two images of each prompt"):
        metrics.diversity(several[:, :1])
    assert metrics.patch_distance(several[:, 0], several[:, 1]).mean() == pytest.approx(
        metrics.same_noise_distance(several[:, 0], several[:, 1])
    )


def test_features_that_are_not_finite_are_refused_naming_the_first() -> None:
    a = features(8, 3, 37)
    metrics.check_features(a, "probe")
    a[5, 1], a[6, 0] = np.nan, np.inf
    with pytest.raises(
        UserError, match=r"probe: the features of 2 of 8 images are not finite; the first is .* 5"
    ):
        metrics.check_features(a, "probe")
