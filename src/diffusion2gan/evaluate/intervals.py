"""Bootstrap intervals: how much a number would move with other captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_RESAMPLES = 1000
MAX_DISTANCE_RESAMPLES = (
    200  # of a distance between sets, which costs a thousand times what a mean does
)
FEWEST = 6  # captions, for an interval of a distance by a kernel: of fewer, too many resamples are one picture alone

Rows = NDArray[np.integer]
Features = NDArray[np.floating]
Distances = Callable[
    [Features, Features, Features, Features], Features
]  # metrics.kernel_distances, metrics.cmmds
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
    """The `level` interval of `statistic`, a function of which of `count` captions are looked at, repeats allowed.

    Captions are drawn with replacement (Efron 1979), their pictures and references with them, `num_resamples` times;
    the quantiles of the outcomes are moved as `around` says. The same `seed` draws the same captions.
    """
    rng = np.random.default_rng(seed)
    point = statistic(np.arange(count)) if point is None else point
    return around(
        point, [statistic(rng.integers(count, size=count)) for _ in range(num_resamples)], level
    )


def around(
    point: float, outcomes: Sequence[float] | NDArray[np.floating], level: float = LEVEL
) -> Interval:
    """The quantiles of `outcomes`, the resamples' statistics, moved to have the mean `point`, the one of all captions.

    The move matters for Fréchet distances: a resample has only 63 % different pictures, so its covariance is less well
    known and its distance larger, and plain quantiles can leave out the number they belong to. The interval is about
    what this many pictures give on average: the bias of few pictures itself is in the number and not in the interval.
    """
    told = np.asarray(outcomes, np.float64)
    low, high = np.quantile(told - told.mean(), [(1 - level) / 2, (1 + level) / 2])
    return float(point + low), float(point + high)


def times_drawn(count: int, num_resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """[num_resamples, count]: how often each caption is drawn in the resamples that `bootstrap` takes."""
    rng = np.random.default_rng(seed)
    rows = (rng.integers(count, size=count) for _ in range(num_resamples))
    return np.array([np.bincount(one, minlength=count) for one in rows], np.float64).reshape(
        num_resamples, count
    )


def of_kernels(
    kernels: Mapping[str, tuple[Distances, Features, Features]], *, paired: bool, num_resamples: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Numbers and intervals of distances by a kernel, each of one pass: name → (its function, `a`, `b`).

    `paired`: row i of `a` and of `b` are of one caption and drawn together; otherwise `b` stays as it is. Between equal
    distributions such a distance hangs on pairs of captions alone, and resampling is then up to √3 times too wide
    (Arcones & Giné 1992 centre it, which would be too narrow elsewhere). No interval with fewer than FEWEST captions.
    """
    numbers: dict[str, float] = {}
    found: dict[str, Interval] = {}
    for key, (distances, a, b) in kernels.items():
        num = min(num_resamples, MAX_DISTANCE_RESAMPLES) if len(a) >= FEWEST else 0
        times = np.vstack([np.ones((1, len(a))), times_drawn(len(a), num)])
        point, *outcomes = map(
            float, distances(a, b, times, times if paired else np.ones((1, len(b))))
        )
        numbers[key] = point
        if outcomes:
            found[key] = around(point, outcomes)
    return numbers, found


def bootstrap_mean(
    values: NDArray[np.floating],
    weights: NDArray[np.floating] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """`bootstrap` of Σ values / Σ weights: a mean, or with weights a ratio such as right answers over questions."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    return bootstrap(
        lambda rows: float(values[rows].sum() / weights[rows].sum()),
        len(values),
        num_resamples=num_resamples,
        seed=seed,
        level=level,
    )
