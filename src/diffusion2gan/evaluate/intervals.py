"""Bootstrap intervals: how much a number would move with other captions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_RESAMPLES = 1000

Rows = NDArray[np.integer]
Interval = tuple[float, float]


def bootstrap(
    statistic: Callable[[Rows], float], count: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0,
    level: float = LEVEL, point: float | None = None,
) -> Interval:  # fmt: skip
    """The `level` interval of `statistic`, a function of which of `count` captions are looked at, repeats allowed.

    Captions are drawn with replacement (Efron 1979), their pictures and references with them, `num_resamples` times;
    the quantiles of the outcomes are moved so that their mean is `point`, the statistic of all captions. The move
    matters for Fréchet distances: a resample has only 63 % different pictures, so its covariance is less well known
    and its distance larger, and plain quantiles can leave out the number they belong to. The interval is about what
    this many pictures give on average: the bias of few pictures itself is in the number and not in the interval.
    The same `seed` draws the same captions.
    """
    rng = np.random.default_rng(seed)
    point = statistic(np.arange(count)) if point is None else point
    outcomes = np.array([statistic(rng.integers(count, size=count)) for _ in range(num_resamples)])
    low, high = np.quantile(outcomes - outcomes.mean(), [(1 - level) / 2, (1 + level) / 2])
    return float(point + low), float(point + high)


def bootstrap_mean(
    values: NDArray[np.floating], weights: NDArray[np.floating] | None = None, *, num_resamples: int = NUM_RESAMPLES,
    seed: int = 0, level: float = LEVEL,
) -> Interval:  # fmt: skip
    """`bootstrap` of Σ values / Σ weights: a mean, or with weights a ratio such as right answers over questions."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    return bootstrap(
        lambda rows: float(values[rows].sum() / weights[rows].sum()), len(values), num_resamples=num_resamples,
        seed=seed, level=level,
    )  # fmt: skip
