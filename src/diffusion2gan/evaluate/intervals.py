"""Bootstrap intervals: how much a metric would change with other captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_RESAMPLES = 1000
# For distances between sets, which cost about a thousand times as much as a mean
MAX_DISTANCE_RESAMPLES = 200
# With fewer captions, too many resamples would consist of one image alone.
MIN_KERNEL_CAPTIONS = 6

Rows = NDArray[np.integer]
Features = NDArray[np.floating]
# (a, b, counts_a, counts_b) → [R]: metrics.kernel_distances or metrics.cmmds
KernelDistances = Callable[[Features, Features, Features, Features], Features]
Interval = tuple[float, float]


def bootstrap(
    statistic: Callable[[Rows], float],
    count: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    point: float | None = None,
) -> Interval:
    """The `level` bootstrap interval of `statistic`.

    `statistic` is a function of the indices of the captions used, with repeats. Captions are drawn
    with replacement (Efron 1979), together with their images and references, `num_resamples`
    times; the quantiles of the results are shifted as described in `interval_around`. `point` is
    the statistic of all captions, computed if not given. The same `seed` draws the same captions.
    """
    rng = np.random.default_rng(seed)
    if point is None:
        point = statistic(np.arange(count))

    outcomes = []
    for _ in range(num_resamples):
        outcomes.append(statistic(rng.integers(count, size=count)))
    return interval_around(point, outcomes, level)


def interval_around(
    point: float, outcomes: Sequence[float] | NDArray[np.floating], level: float = LEVEL
) -> Interval:
    """The quantiles of `outcomes`, the resamples' statistics, shifted to have the mean `point`.

    `point` is the statistic of all captions. The shift matters for Fréchet distances: a resample
    has only 63 % distinct images, so its covariance is estimated less well and its distance is
    larger, and plain quantiles can exclude `point` itself. The interval describes the variation
    with this many images; the bias of a small number of images is in `point`, not in the interval.
    """
    values = np.asarray(outcomes, np.float64)
    deviations = values - values.mean()
    low, high = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2])
    return float(point + low), float(point + high)


def resample_counts(count: int, num_resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """[num_resamples, count]: how often each caption is drawn in the resamples of `bootstrap`."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((num_resamples, count))
    for resample in counts:
        resample[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    return counts


def bootstrap_kernel(
    distances: KernelDistances, a: Features, b: Features, *, paired: bool, num_resamples: int
) -> tuple[float, Interval | None]:
    """A kernel distance of `a` and `b`, and its interval, from one pass over the kernel matrix.

    `paired`: row i of `a` and of `b` belong to the same caption and are drawn together; otherwise
    `b` is not resampled. Between equal distributions such a distance depends on pairs of captions
    alone, and the resampled interval is up to √3 times too wide (Arcones & Giné 1992 centre it,
    which would be too narrow in other cases). The interval is None without resamples or with fewer
    than MIN_KERNEL_CAPTIONS captions.
    """
    num = min(num_resamples, MAX_DISTANCE_RESAMPLES)
    if len(a) < MIN_KERNEL_CAPTIONS:
        num = 0

    # Row 0: all captions once, which gives the distance itself
    all_once = np.ones((1, len(a)))
    counts_a = np.vstack([all_once, resample_counts(len(a), num)])
    counts_b = counts_a if paired else np.ones((1, len(b)))
    values = distances(a, b, counts_a, counts_b)

    # The distance and its interval
    point = float(values[0])
    if num == 0:
        return point, None
    return point, interval_around(point, values[1:])


def bootstrap_mean(
    values: NDArray[np.floating],
    weights: NDArray[np.floating] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """`bootstrap` of Σ values / Σ weights over captions [N].

    Without weights this is a mean; with weights a ratio, such as correct answers over questions.
    """
    values = np.asarray(values, np.float64)
    if weights is None:
        weights = np.ones_like(values)
    denominators = np.asarray(weights, np.float64)

    def ratio(rows: Rows) -> float:
        numerator = values[rows].sum()
        return float(numerator / denominators[rows].sum())

    return bootstrap(ratio, len(values), num_resamples=num_resamples, seed=seed, level=level)
