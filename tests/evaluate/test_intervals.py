"""Bootstrap intervals against the normal theory, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffusion2gan.evaluate import metrics
from diffusion2gan.evaluate.intervals import bootstrap, bootstrap_mean, of_kernels, times_drawn


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_mean(values, num_resamples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    wide = bootstrap_mean(values, num_resamples=4000, level=0.99)
    assert wide[1] - wide[0] == pytest.approx(2.576 / 1.96 * (high - low), rel=0.1)


def test_the_interval_of_a_ratio_takes_captions_together() -> None:
    """Captions with 1 or 3 questions, all answers of a caption alike: captions are the unit, not answers."""
    rng = np.random.default_rng(2)
    asked = rng.choice([1.0, 3.0], 500)
    right = asked * (rng.random(500) < 0.7)
    ratio = right.sum() / asked.sum()
    low, high = bootstrap_mean(right, asked, num_resamples=4000)
    error = math.sqrt(((right - ratio * asked) ** 2).sum()) / asked.sum()  # the delta method
    assert (low, high) == pytest.approx(
        (ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error
    )


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).random(50)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)
    assert bootstrap_mean(np.full(20, 0.5)) == (0.5, 0.5)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """60 experiments: the Fréchet distance that 60 pictures give on average, known from 2 000 other draws."""
    rng = np.random.default_rng(4)
    count, dimension = 60, 4

    def draw() -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal((count, dimension)) * 1.3 + 0.3, rng.standard_normal(
            (count, dimension)
        )

    truth = np.mean([metrics.frechet_distance(*draw()) for _ in range(2000)])
    held, plain, experiments = 0, 0, 60
    for _ in range(experiments):
        a, b = draw()
        outcomes: list[float] = []

        def distance(
            rows: np.ndarray, a: np.ndarray = a, b: np.ndarray = b, told: list[float] = outcomes
        ) -> float:
            told.append(metrics.frechet_distance(a[rows], b[rows]))
            return told[-1]

        low, high = bootstrap(distance, count, num_resamples=200)
        held += low <= truth <= high
        plain += np.quantile(outcomes[1:], 0.025) <= truth <= np.quantile(outcomes[1:], 0.975)
    assert 0.85 <= held / experiments <= 1
    assert (
        held > plain
    )  # plain quantiles miss more often: resamples look further apart than the sets are


KERNELS = {"kernel_distance": metrics.kernel_distances, "cmmd": metrics.cmmds}


def resampled(
    a: np.ndarray, b: np.ndarray, times_a: np.ndarray, times_b: np.ndarray
) -> tuple[float, float]:
    """KID without pairs of a picture and itself, and CMMD with them, of repeated rows: by loops over the formulas."""
    rows = [
        np.repeat(np.arange(len(x)), times.astype(int)) for x, times in ((a, times_a), (b, times_b))
    ]
    cubic = lambda x, y: (x @ y / a.shape[1] + 1) ** 3  # noqa: E731
    within = [
        np.mean([cubic(x[i], x[j]) for i in chosen for j in chosen if i != j])
        for x, chosen in zip((a, b), rows, strict=True)
    ]
    across = np.mean([[cubic(a[i], b[j]) for j in rows[1]] for i in rows[0]])
    return sum(within) - 2 * across, metrics.cmmd(a[rows[0]], b[rows[1]])


def test_distances_of_resamples_are_those_of_repeated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((9, 4)), rng.standard_normal((7, 4)) + 0.4
    times = rng.integers(0, 3, (3, 9)).astype(float), rng.integers(0, 3, (3, 7)).astype(float)
    monkeypatch.setattr(metrics, "BLOCK", 4)
    expected = np.array([resampled(a, b, s, t) for s, t in zip(*times, strict=True)])
    np.testing.assert_allclose(metrics.kernel_distances(a, b, *times), expected[:, 0], rtol=1e-10)
    np.testing.assert_allclose(metrics.cmmds(a, b, *times), expected[:, 1], rtol=1e-8)
    fixed = metrics.kernel_distances(a, b, times[0], np.ones((1, 7)))
    np.testing.assert_allclose(
        fixed, [resampled(a, b, s, np.ones(7))[0] for s in times[0]], rtol=1e-10
    )


def test_times_drawn_are_the_draws_of_bootstrap() -> None:
    drawn: list[np.ndarray] = []
    bootstrap(
        lambda rows: float(drawn.append(np.bincount(rows, minlength=11)) or 0),
        11,
        num_resamples=4,
        seed=6,
    )
    assert np.array_equal(times_drawn(11, 4, 6), drawn[1:])
    assert times_drawn(11, 0).shape == (0, 11)


def test_intervals_of_kernels_hold_the_truth_about_as_often_as_they_say() -> None:
    """60 experiments each: sets apart, where resampling is right, and of one distribution, where it is wide."""
    rng = np.random.default_rng(7)
    count, dimension = 50, 4
    for move, least in ((1.0, 0.85), (0.0, 0.97)):

        def draw(move: float = move) -> tuple[np.ndarray, np.ndarray]:
            return rng.standard_normal((count, dimension)) + move, rng.standard_normal(
                (count, dimension)
            )

        truth = {key: np.mean([one(*draw()) for _ in range(1500)]) for key, one in POINTS.items()}
        held, experiments = dict.fromkeys(KERNELS, 0), 60
        for _ in range(experiments):
            a, b = draw()
            numbers, found = of_kernels(
                {k: (f, a, b) for k, f in KERNELS.items()}, paired=True, num_resamples=200
            )
            assert numbers == {
                key: pytest.approx(one(a, b), rel=1e-9) for key, one in POINTS.items()
            }
            for key in KERNELS:
                held[key] += found[key][0] <= truth[key] <= found[key][1]
        assert min(held.values()) / experiments >= least, (move, held)


POINTS = {"kernel_distance": metrics.kernel_distance, "cmmd": metrics.cmmd}


def test_no_interval_of_too_few_captions_or_without_resamples() -> None:
    a, b = np.random.default_rng(8).standard_normal((2, 5, 3))
    kernels = {"kernel_distance": (metrics.kernel_distances, a, b)}
    assert of_kernels(kernels, paired=True, num_resamples=100)[1] == {}
    more = {"cmmd": (metrics.cmmds, np.tile(a, (2, 1)), b)}
    numbers, found = of_kernels(more, paired=False, num_resamples=0)
    assert found == {} and numbers["cmmd"] == pytest.approx(metrics.cmmd(*more["cmmd"][1:]))
    low, high = of_kernels(more, paired=False, num_resamples=50)[1]["cmmd"]
    assert low < numbers["cmmd"] < high
