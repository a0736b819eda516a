"""Metrics: pure functions of feature arrays, float64. `a` are a system's pictures, `b` the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion2gan.errors import UserError

Features = NDArray[np.floating]
Distance = Callable[[Features, Features], Features]  # (a [B, …], b [B, …]) → [B]

BLOCK = 1024  # rows at a time where a table of all pairs is needed: memory stays BLOCK × N
NEAREST_PRECISION = 3  # neighbours: Kynkäänniemi et al. 2019
NEAREST_DENSITY = 5  # neighbours: Naeem et al. 2020


# -------------------------------------------------------------------------------------------------- Fréchet distance


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance between Gaussians fitted to `a` [N, D] and `b` [M, D] (Heusel et al. 2017, eq. 6).

    |μa−μb|² + tr(Σa + Σb − 2(ΣaΣb)^½), the last trace taken as the nuclear norm of Σa^½ Σb^½, which is symmetric in
    a and b and needs no matrix logarithm. Raises UserError with fewer than two rows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    _check_rows(len(a), len(b))
    root_a, root_b = _centred(a), _centred(b)  # Σ = rootᵀ root
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    squares = np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross
    return float(max(0.0, np.square(a.mean(0) - b.mean(0)).sum() + squares))


def _centred(x: Features) -> Features:
    """A square root R of the covariance of `x` (RᵀR = Σ, unbiased), at most D rows."""
    rows = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows


@dataclass(frozen=True)
class Moments:
    """What the Fréchet distance needs of features too many to hold: parts are summed by `+`, in any order.

    `count` rows, their `mean` [D], and `scatter` [D, D] = Σ (x−mean)(x−mean)ᵀ.
    """

    count: int
    mean: Features
    scatter: Features

    @classmethod
    def of(cls, rows: Features) -> Moments:
        """Of `rows` [N, D]."""
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        apart = rows - mean
        return cls(len(rows), mean, apart.T @ apart)

    def covariance(self) -> Features:
        """[D, D], unbiased."""
        return np.asarray(self.scatter / (self.count - 1))

    def __add__(self, other: Moments) -> Moments:
        """Of both sets of rows together (Chan, Golub & LeVeque 1979: no sum of squares, nothing cancels)."""
        count, shift = self.count + other.count, other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """The Fréchet distance of streamed features. Raises UserError with fewer than two rows a side."""
    _check_rows(a.count, b.count)
    root_a, root_b = _root(a.covariance()), _root(b.covariance())
    inner = root_a.T @ root_b
    cross = np.sqrt(
        np.linalg.eigvalsh(inner.T @ inner).clip(0)
    ).sum()  # the nuclear norm of `inner`
    squares = np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross
    return float(max(0.0, np.square(a.mean - b.mean).sum() + squares))


def _root(covariance: Features) -> Features:
    """R with RRᵀ = Σ: Cholesky's factor, or where Σ is singular the one of its eigenvectors."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(values.clip(0)))


def _check_rows(count_a: int, count_b: int) -> None:
    if min(count_a, count_b) < 2:
        raise UserError(
            f"the Fréchet distance needs two pictures a side, got {count_a} and {count_b}; raise --count"
        )


# -------------------------------------------------------------------------------------------- distances by a kernel


def kernel_distance(a: Features, b: Features) -> float:
    """KID: unbiased squared MMD of `a` [N, D] and `b` [M, D] under (x·y/D + 1)³ (Bińkowski et al. 2018).

    Over all rows at once, where others average over random subsets of 1 000: the same expectation with less variance
    and no randomness. May be slightly negative. Raises UserError with fewer than two rows a side.
    """
    return float(kernel_distances(a, b, np.ones((1, len(a))), np.ones((1, len(b))))[0])


def kernel_distances(a: Features, b: Features, times_a: Features, times_b: Features) -> Features:
    """[R]: KIDs of R resamples, in which row i of `a` counts times_a[r, i] times ([R, N]), of `b` times_b ([R, M]).

    One pass over the kernel's table, whatever R is; R may be 1 on one side. No picture is compared with itself, nor
    with its own repeats.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2:
        raise UserError(
            f"the kernel distance needs two pictures a side, got {len(a)} and {len(b)}; raise --count"
        )
    within = []
    for x, times in ((a, times_a), (b, times_b)):
        alone = np.square(times) @ (np.square(x).sum(1) / x.shape[1] + 1) ** 3
        num_pairs = np.square(times.sum(1)) - np.square(times).sum(
            1
        )  # 0 where one row is all that was drawn
        within.append((_weighted(_cubic(x, x), times, times) - alone) / np.maximum(num_pairs, 1))
    across = _weighted(_cubic(a, b), times_a, times_b) / (times_a.sum(1) * times_b.sum(1))
    return np.asarray(sum(within) - 2 * across)


def cmmd(a: Features, b: Features) -> float:
    """CMMD: 1000 × the squared MMD (biased) of unit vectors under a Gaussian kernel, σ = 10 (Jayasumana et al. 2024).

    `a` [N, D], `b` [M, D]: CLIP embeddings; they are brought to unit length here, as its authors do.
    """
    return float(cmmds(a, b, np.ones((1, len(a))), np.ones((1, len(b))))[0])


def cmmds(a: Features, b: Features, times_a: Features, times_b: Features) -> Features:
    """[R]: CMMDs of R resamples, as `kernel_distances`."""
    a, b = (_unit(np.asarray(x, np.float64)) for x in (a, b))
    parts = [
        _weighted(_gaussian(x, y), s, t) / (s.sum(1) * t.sum(1))
        for x, y, s, t in (
            (a, a, times_a, times_a),
            (b, b, times_b, times_b),
            (a, b, times_a, times_b),
        )
    ]
    return np.asarray(1000 * (parts[0] + parts[1] - 2 * parts[2]))


def _weighted(blocks: Iterator[Features], times_a: Features, times_b: Features) -> Features:
    """[R]: Σ times_a[r, i] · table[i, j] · times_b[r, j], the table given in blocks of its rows."""
    total, start = np.zeros(len(times_a)), 0
    for block in blocks:
        rows = times_a[:, start : start + len(block)]
        total += (rows @ block * times_b).sum(1)
        start += len(block)
    return total


def _cubic(a: Features, b: Features) -> Iterator[Features]:
    yield from ((a[i : i + BLOCK] @ b.T / a.shape[1] + 1) ** 3 for i in range(0, len(a), BLOCK))


def _gaussian(a: Features, b: Features, sigma: float = 10.0) -> Iterator[Features]:
    yield from (np.exp(-squares / (2 * sigma**2)) for squares in _squares(a, b))


def _squares(a: Features, b: Features) -> Iterator[Features]:
    """[≤ BLOCK, M] squared distances of the rows of `a` to all of `b`, block by block."""
    norms = np.square(b).sum(1)
    for i in range(0, len(a), BLOCK):
        rows = a[i : i + BLOCK]
        yield np.maximum(np.square(rows).sum(1)[:, None] + norms - 2 * rows @ b.T, 0)


def _unit(x: Features) -> Features:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12))


# ------------------------------------------------------------------------------------- fidelity and variety, apart


@dataclass(frozen=True)
class Manifold:
    """One number a picture; the means are the metrics. `precision`, `density` of [N] `a`; `recall`, `coverage` of [M].

    A picture's ball reaches to its k-th nearest neighbour in its own set, the border belonging to it.
    precision: a picture of `a` lies in some ball of `b`; recall: one of `b` in some ball of `a` (k = 3, Kynkäänniemi
    et al. 2019). density: in how many balls of `b`, over k; coverage: the ball of one of `b` holds any of `a` (k = 5,
    Naeem et al. 2020).
    """

    precision: Features
    recall: Features
    density: Features
    coverage: Features


def manifold(a: Features, b: Features) -> Manifold:
    """Precision, recall, density and coverage of `a` [N, D] against `b` [M, D], a number a picture.

    Raises UserError with too few rows for five neighbours.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) <= NEAREST_DENSITY:
        raise UserError(
            f"precision, recall, density and coverage need {NEAREST_DENSITY + 1} pictures a side, got {len(a)} and "
            f"{len(b)}; raise --count"
        )
    a, b = a - b.mean(0), b - b.mean(0)  # small numbers: |x|² + |y|² − 2x·y loses nothing
    near_a = _radii(a, (NEAREST_PRECISION,))[:, 0]
    near_b, wide_b = _radii(b, (NEAREST_PRECISION, NEAREST_DENSITY)).T
    precision, density = [], []
    recall, coverage = np.zeros(len(b), bool), np.zeros(len(b), bool)
    for start, squares in zip(range(0, len(a), BLOCK), _squares(a, b), strict=True):
        precision.append((squares <= near_b).any(1))
        density.append((squares <= wide_b).sum(1) / NEAREST_DENSITY)
        recall |= (squares <= near_a[start : start + BLOCK, None]).any(0)
        coverage |= (squares <= wide_b).any(0)
    return Manifold(
        np.concatenate(precision).astype(np.float64),
        recall.astype(np.float64),
        np.concatenate(density),
        coverage.astype(np.float64),
    )


def _radii(x: Features, ks: Sequence[int]) -> Features:
    """[N, len(ks)] squared distance to the k-th nearest of the others, widened by rounding."""
    parts = []
    for start, squares in zip(range(0, len(x), BLOCK), _squares(x, x), strict=True):
        rows = np.arange(len(squares))
        squares[rows, start + rows] = -1  # itself, before every other
        parts.append(np.partition(squares, ks, axis=1)[:, list(ks)])
    return np.concatenate(parts) + 1e-12 * np.square(x).sum(1).max()


# --------------------------------------------------------------------------------------------- picture by picture


def cosine(a: Features, b: Features) -> Features:
    """[N] cosine of corresponding rows."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, 1e-12))


def clip_score(image_embeds: Features, text_embeds: Features) -> float:
    """Mean cosine between pictures [N, D] and their prompts [N, D] (Hessel et al. 2021, without the factor 2.5)."""
    return float(cosine(image_embeds, text_embeds).mean())


def patch_distance(a: Features, b: Features) -> Features:
    """[N]: 1 − cosine, averaged over the patches of features [N, P, D]: DreamSim's form, with the features given."""
    return np.asarray(1 - cosine(a, b).mean(-1))


def cosine_distance(a: Features, b: Features) -> Features:
    """[N]: 1 − cosine of corresponding rows [N, D]: DreamSim's distance, with the embeddings given."""
    return np.asarray(1 - cosine(a, b))


def same_noise_distance(a: Features, b: Features) -> float:
    """Mean of 1 − cosine over corresponding patches [N, P, D]: DreamSim's form, with the features given."""
    return float(1 - cosine(a, b).mean())


def diversity(features: Features, distance: Distance = patch_distance) -> Features:
    """[N]: the mean `distance` between all pairs of K pictures of one prompt, from features [N, K, …].

    DreamDiv is its mean over prompts, with DreamSim as the distance. Any distance
    (a [B, …], b [B, …]) → [B] will do. Raises UserError with one picture a prompt.
    """
    num = features.shape[1]
    if num < 2:
        raise UserError("diversity needs two pictures of each prompt, got one; raise --num-noises")
    pairs = [(i, j) for i in range(num) for j in range(i)]
    return np.asarray(np.mean([distance(features[:, i], features[:, j]) for i, j in pairs], axis=0))


def share(right: Sequence[bool]) -> float:
    return float(np.mean(np.asarray(right, np.float64))) if len(right) else float("nan")


def check_features(features: Features, what: str) -> None:
    """Raises UserError where a picture's features are not finite: it names how many and the first."""
    bad = np.flatnonzero(~np.isfinite(features).reshape(len(features), -1).all(1))
    if len(bad):
        raise UserError(
            f"{what}: the features of {len(bad)} of {len(features)} pictures are not finite, the first is picture "
            f"{bad[0]}. Look at that picture, and whether the feature network's weights are whole."
        )
