"""Bootstrap intervals against the normal theory, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffusion2gan.evaluate import metrics
from diffusion2gan.evaluate.intervals import bootstrap, bootstrap_mean


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap_mean(values, num_resamples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
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
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error)


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
        return rng.standard_normal((count, dimension)) * 1.3 + 0.3, rng.standard_normal((count, dimension))

    truth = np.mean([metrics.frechet_distance(*draw()) for _ in range(2000)])
    held, plain, experiments = 0, 0, 60
    for _ in range(experiments):
        a, b = draw()
        outcomes: list[float] = []

        def distance(rows: np.ndarray, a: np.ndarray = a, b: np.ndarray = b, told: list[float] = outcomes) -> float:
            told.append(metrics.frechet_distance(a[rows], b[rows]))
            return told[-1]

        low, high = bootstrap(distance, count, num_resamples=200)
        held += low <= truth <= high
        plain += np.quantile(outcomes[1:], 0.025) <= truth <= np.quantile(outcomes[1:], 0.975)
    assert 0.85 <= held / experiments <= 1
    assert held > plain  # plain quantiles miss more often: resamples look further apart than the sets are
