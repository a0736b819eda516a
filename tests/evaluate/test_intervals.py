"""Bootstrap intervals against normal theory, and by how often they contain the true value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffusion2gan.evaluate import metrics
from diffusion2gan.evaluate.intervals import (
    bootstrap,
    bootstrap_kernel,
    bootstrap_mean,
    resample_counts,
)

POINTS = {"kernel_distance": metrics.kernel_distance, "cmmd": metrics.cmmd}
KERNELS = {"kernel_distance": metrics.kernel_distances, "cmmd": metrics.cmmds}


def test_interval_of_a_mean_matches_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_mean(values, num_resamples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )

    wide = bootstrap_mean(values, num_resamples=4000, level=0.99)
    assert wide[1] - wide[0] == pytest.approx(2.576 / 1.96 * (high - low), rel=0.1)


def test_interval_of_a_ratio_resamples_captions_not_answers() -> None:
    """Captions with 1 or 3 questions, whose answers are all alike: captions are the unit."""
    rng = np.random.default_rng(2)
    asked = rng.choice([1.0, 3.0], 500)
    right = asked * (rng.random(500) < 0.7)
    ratio = right.sum() / asked.sum()
    low, high = bootstrap_mean(right, asked, num_resamples=4000)

    # Standard error by the delta method
    error = math.sqrt(((right - ratio * asked) ** 2).sum()) / asked.sum()
    assert (low, high) == pytest.approx(
        (ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error
    )


def test_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).random(50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)
    assert bootstrap_mean(np.full(20, 0.5)) == (0.5, 0.5)


def test_intervals_contain_the_true_value_as_often_as_their_level() -> None:
    """60 experiments; the true value is the mean Fréchet distance of 2 000 draws of 60 images."""
    rng = np.random.default_rng(4)
    count, dimension = 60, 4

    def draw() -> tuple[np.ndarray, np.ndarray]:
        a = rng.standard_normal((count, dimension)) * 1.3 + 0.3
        b = rng.standard_normal((count, dimension))
        return a, b

    truth = np.mean([metrics.frechet_distance(*draw()) for _ in range(2000)])
    num_hits, num_plain_hits, experiments = 0, 0, 60
    for _ in range(experiments):
        a, b = draw()
        outcomes: list[float] = []

        def distance(
            rows: np.ndarray, a: np.ndarray = a, b: np.ndarray = b, seen: list[float] = outcomes
        ) -> float:
            seen.append(metrics.frechet_distance(a[rows], b[rows]))
            return seen[-1]

        low, high = bootstrap(distance, count, num_resamples=200)
        num_hits += low <= truth <= high
        plain_low, plain_high = np.quantile(outcomes[1:], [0.025, 0.975])
        num_plain_hits += plain_low <= truth <= plain_high
    assert 0.85 <= num_hits / experiments <= 1

    # Plain quantiles miss more often: resamples are further apart than the sets are
    assert num_hits > num_plain_hits


def distances_of_repeated_rows(
    a: np.ndarray, b: np.ndarray, counts_a: np.ndarray, counts_b: np.ndarray
) -> tuple[float, float]:
    """KID and CMMD of repeated rows, by loops over the formulas.

    KID leaves out pairs of an image with itself or its repeats; CMMD includes them.
    """
    rows_a = np.repeat(np.arange(len(a)), counts_a.astype(int))
    rows_b = np.repeat(np.arange(len(b)), counts_b.astype(int))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / a.shape[1] + 1) ** 3)

    def mean_within(x: np.ndarray, rows: np.ndarray) -> float:
        values = [kernel(x[i], x[j]) for i in rows for j in rows if i != j]
        return float(np.mean(values))

    across = np.mean([kernel(a[i], b[j]) for i in rows_a for j in rows_b])
    kid = mean_within(a, rows_a) + mean_within(b, rows_b) - 2 * across
    return float(kid), metrics.cmmd(a[rows_a], b[rows_b])


def test_distances_of_resamples_equal_those_of_repeated_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((9, 4)), rng.standard_normal((7, 4)) + 0.4
    counts_a = rng.integers(0, 3, (3, 9)).astype(float)
    counts_b = rng.integers(0, 3, (3, 7)).astype(float)
    monkeypatch.setattr(metrics, "BLOCK", 4)

    expected = []
    for row_a, row_b in zip(counts_a, counts_b, strict=True):
        expected.append(distances_of_repeated_rows(a, b, row_a, row_b))
    kids, cmmds = np.array(expected).T
    found = metrics.kernel_distances(a, b, counts_a, counts_b)
    np.testing.assert_allclose(found, kids, rtol=1e-10)
    np.testing.assert_allclose(metrics.cmmds(a, b, counts_a, counts_b), cmmds, rtol=1e-8)

    # One row of counts applies to all resamples
    fixed = metrics.kernel_distances(a, b, counts_a, np.ones((1, 7)))
    expected_fixed = [distances_of_repeated_rows(a, b, row, np.ones(7))[0] for row in counts_a]
    np.testing.assert_allclose(fixed, expected_fixed, rtol=1e-10)


def test_resample_counts_are_the_draws_of_bootstrap() -> None:
    drawn: list[np.ndarray] = []

    def record(rows: np.ndarray) -> float:
        drawn.append(np.bincount(rows, minlength=11))
        return 0.0

    bootstrap(record, 11, num_resamples=4, seed=6)
    assert np.array_equal(resample_counts(11, 4, 6), drawn[1:])  # the first is the point
    assert resample_counts(11, 0).shape == (0, 11)


@pytest.mark.parametrize(
    ("shift", "seed", "least"),
    [(1.0, 7, 0.85), (0.0, 77, 0.97)],
    ids=["different distributions", "equal distributions, where the interval is wide"],
)
def test_kernel_intervals_contain_the_true_value_as_often_as_their_level(
    shift: float, seed: int, least: float
) -> None:
    """60 experiments; the true value is the mean distance of 1 500 draws of 50 images."""
    rng = np.random.default_rng(seed)
    count, dimension, experiments = 50, 4, 60

    def draw() -> tuple[np.ndarray, np.ndarray]:
        a = rng.standard_normal((count, dimension)) + shift
        return a, rng.standard_normal((count, dimension))

    truth = {}
    for name, point in POINTS.items():
        truth[name] = np.mean([point(*draw()) for _ in range(1500)])

    num_hits = dict.fromkeys(KERNELS, 0)
    for _ in range(experiments):
        a, b = draw()
        for name, distances in KERNELS.items():
            value, interval = bootstrap_kernel(distances, a, b, paired=True, num_resamples=200)
            assert value == pytest.approx(POINTS[name](a, b), rel=1e-9)
            assert interval is not None
            num_hits[name] += interval[0] <= truth[name] <= interval[1]
    assert min(num_hits.values()) / experiments >= least, num_hits


def test_no_interval_of_too_few_captions_or_without_resamples() -> None:
    a, b = np.random.default_rng(8).standard_normal((2, 5, 3))
    _, interval = bootstrap_kernel(metrics.kernel_distances, a, b, paired=True, num_resamples=100)
    assert interval is None

    more = np.tile(a, (2, 1))
    value, interval = bootstrap_kernel(metrics.cmmds, more, b, paired=False, num_resamples=0)
    assert interval is None and value == pytest.approx(metrics.cmmd(more, b))

    value, interval = bootstrap_kernel(metrics.cmmds, more, b, paired=False, num_resamples=50)
    assert interval is not None and interval[0] < value < interval[1]
