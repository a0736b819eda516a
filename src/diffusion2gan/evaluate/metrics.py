"""Metrics as pure functions of feature arrays, computed in float64.

In functions of two sets, `a` has the features of a system's images, `b` those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion2gan.errors import UserError

Features = NDArray[np.floating]
Distance = Callable[[Features, Features], Features]  # (a [B, …], b [B, …]) → [B]

BLOCK = 1024  # rows per block of a matrix of all pairs, so that its memory is BLOCK × N
NEAREST_PRECISION = 3  # neighbours (k) of precision and recall: Kynkäänniemi et al. 2019
NEAREST_DENSITY = 5  # neighbours (k) of density and coverage: Naeem et al. 2020


# ------------------------------------------------------------------------------ Fréchet distance


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance between Gaussians fitted to `a` [N, D] and `b` [M, D], in [0, ∞).

    Heusel et al. 2017, eq. 6: |μa − μb|² + tr(Σa + Σb − 2(ΣaΣb)^½). The trace of the matrix root is
    computed as the nuclear norm of Σa^½ Σb^½, which is symmetric in a and b and needs no general
    matrix square root. Raises UserError if a set has fewer than two rows.
    """
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    _check_num_rows(len(a), len(b))

    # Covariances: Σ = rootᵀ root
    root_a = _covariance_root(a)
    root_b = _covariance_root(b)
    trace_of_root = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    trace_a = np.square(root_a).sum()
    trace_b = np.square(root_b).sum()
    traces = trace_a + trace_b - 2 * trace_of_root

    # Means
    shift = a.mean(0) - b.mean(0)
    squared_shift = np.square(shift).sum()

    # Rounding can make the distance of two equal sets slightly negative
    return float(max(0.0, squared_shift + traces))


def _covariance_root(x: Features) -> Features:
    """[≤ D, D]: a matrix R with RᵀR = Σ, the unbiased covariance of the rows of `x` [N, D]."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


@dataclass(frozen=True)
class Moments:
    """The first two moments of a set of rows, for the Fréchet distance of streamed features.

    `count` rows, their `mean` [D], and `scatter` [D, D] = Σ (x − mean)(x − mean)ᵀ. The moments of a
    union of sets are the sum (`+`) of the sets' moments, in any order.
    """

    count: int
    mean: Features
    scatter: Features

    @classmethod
    def from_rows(cls, rows: Features) -> Moments:
        """The moments of `rows` [N, D]."""
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    def covariance(self) -> Features:
        """[D, D], unbiased."""
        return np.asarray(self.scatter / (self.count - 1))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub & LeVeque 1979).

        No sums of squares are subtracted, so nothing cancels.
        """
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """`frechet_distance` from moments. Raises UserError if a set has fewer than two rows."""
    _check_num_rows(a.count, b.count)

    # Covariances: Σ = root rootᵀ; the nuclear norm of `inner` is the sum of its singular values
    root_a = _symmetric_root(a.covariance())
    root_b = _symmetric_root(b.covariance())
    inner = root_a.T @ root_b
    squared_singular_values = np.linalg.eigvalsh(inner.T @ inner).clip(0)
    trace_of_root = np.sqrt(squared_singular_values).sum()
    trace_a = np.square(root_a).sum()
    trace_b = np.square(root_b).sum()
    traces = trace_a + trace_b - 2 * trace_of_root

    # Means
    squared_shift = np.square(a.mean - b.mean).sum()
    return float(max(0.0, squared_shift + traces))


def _symmetric_root(covariance: Features) -> Features:
    """[D, D]: a matrix R with RRᵀ = Σ.

    The Cholesky factor; if Σ is singular, computed from its eigenvectors.
    """
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(values.clip(0)))


def _check_num_rows(num_a: int, num_b: int) -> None:
    if min(num_a, num_b) < 2:
        raise UserError(
            f"the Fréchet distance needs at least two images in each set, got {num_a} of the "
            f"system and {num_b} of the reference; use more images (--count, or a larger "
            "--reference)"
        )


# ------------------------------------------------------------------------------- kernel distances


def kernel_distance(a: Features, b: Features) -> float:
    """KID: unbiased squared MMD of `a` [N, D] and `b` [M, D] with the kernel (x·y/D + 1)³.

    Bińkowski et al. 2018, computed over all rows at once. Other implementations average over
    random subsets of 1 000 rows: the same expectation, with more variance. May be slightly
    negative. Raises UserError if a set has fewer than two rows.
    """
    counts_a = np.ones((1, len(a)))
    counts_b = np.ones((1, len(b)))
    return float(kernel_distances(a, b, counts_a, counts_b)[0])


def kernel_distances(a: Features, b: Features, counts_a: Features, counts_b: Features) -> Features:
    """[R]: KID of R resamples of `a` [N, D] and `b` [M, D].

    Resample r contains row i of `a` counts_a[r, i] times and row j of `b` counts_b[r, j] times,
    with `counts_a` [R, N] and `counts_b` [R, M]; one of them may have a single row, which then
    applies to all resamples. The kernel matrix is computed once, whatever R is. No image is
    compared with itself or with its repeats. Raises UserError if a set has fewer than two rows.
    """
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2:
        raise UserError(
            f"the kernel distance needs at least two images in each set, got {len(a)} of the "
            f"system and {len(b)} of the reference; use more images (--count, or a larger "
            "--reference)"
        )

    # Mean kernel values within each set and across the sets
    within_a = _mean_cubic_kernel_within(a, counts_a)
    within_b = _mean_cubic_kernel_within(b, counts_b)
    num_pairs = counts_a.sum(1) * counts_b.sum(1)
    across = _weighted_sum(_cubic_kernel(a, b), counts_a, counts_b) / num_pairs
    return np.asarray(within_a + within_b - 2 * across)


def _mean_cubic_kernel_within(x: Features, counts: Features) -> Features:
    """[R]: the mean kernel value of all pairs of different rows of `x` [N, D] in each resample."""
    total = _weighted_sum(_cubic_kernel(x, x), counts, counts)

    # Without a row's pairs with itself and with its repeats
    squared_counts = np.square(counts)
    squared_norms = np.square(x).sum(1)
    diagonal = squared_counts @ (squared_norms / x.shape[1] + 1) ** 3
    num_pairs = np.square(counts.sum(1)) - squared_counts.sum(1)

    # num_pairs is 0 if a resample consists of repeats of one row
    return np.asarray((total - diagonal) / np.maximum(num_pairs, 1))


def cmmd(a: Features, b: Features) -> float:
    """CMMD: 1000 × the (biased) squared MMD of unit vectors with a Gaussian kernel of σ = 10.

    Jayasumana et al. 2024. `a` [N, D] and `b` [M, D] are CLIP embeddings, which are normalised to
    unit length here, as in the authors' code.
    """
    counts_a = np.ones((1, len(a)))
    counts_b = np.ones((1, len(b)))
    return float(cmmds(a, b, counts_a, counts_b)[0])


def cmmds(a: Features, b: Features, counts_a: Features, counts_b: Features) -> Features:
    """[R]: CMMD of R resamples, with the arguments of `kernel_distances`."""
    a = _normalize_rows(np.asarray(a, np.float64))
    b = _normalize_rows(np.asarray(b, np.float64))

    within_a = _mean_gaussian_kernel(a, a, counts_a, counts_a)
    within_b = _mean_gaussian_kernel(b, b, counts_b, counts_b)
    across = _mean_gaussian_kernel(a, b, counts_a, counts_b)
    return np.asarray(1000 * (within_a + within_b - 2 * across))


def _mean_gaussian_kernel(
    a: Features, b: Features, counts_a: Features, counts_b: Features
) -> Features:
    """[R]: the mean kernel value of all pairs of a row of `a` and a row of `b` in each resample."""
    num_pairs = counts_a.sum(1) * counts_b.sum(1)
    total = _weighted_sum(_gaussian_kernel(a, b), counts_a, counts_b)
    return np.asarray(total / num_pairs)


def _weighted_sum(blocks: Iterator[Features], counts_a: Features, counts_b: Features) -> Features:
    """[R]: Σ counts_a[r, i] · matrix[i, j] · counts_b[r, j], the matrix given in blocks of rows."""
    total = np.zeros(len(counts_a))
    start = 0
    for block in blocks:
        rows = counts_a[:, start : start + len(block)]
        total += (rows @ block * counts_b).sum(1)
        start += len(block)
    return total


def _cubic_kernel(a: Features, b: Features) -> Iterator[Features]:
    """[≤ BLOCK, M] kernel values (x·y/D + 1)³ of rows of `a` with all of `b`, block by block."""
    dimension = a.shape[1]
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        yield (rows @ b.T / dimension + 1) ** 3


def _gaussian_kernel(a: Features, b: Features, sigma: float = 10.0) -> Iterator[Features]:
    """[≤ BLOCK, M] kernel values exp(−|x − y|² / 2σ²), block by block."""
    for squares in _squared_distances(a, b):
        yield np.exp(-squares / (2 * sigma**2))


def _squared_distances(a: Features, b: Features) -> Iterator[Features]:
    """[≤ BLOCK, M] squared distances of the rows of `a` to all of `b`, block by block."""
    norms_b = np.square(b).sum(1)
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        norms_a = np.square(rows).sum(1)[:, None]
        squares = norms_a + norms_b - 2 * rows @ b.T
        yield np.maximum(squares, 0)


def _normalize_rows(x: Features) -> Features:
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.asarray(x / np.maximum(norms, 1e-12))


# ----------------------------------------------------------------- fidelity and variety separately


@dataclass(frozen=True)
class Manifold:
    """Precision, recall, density and coverage, one number per image; the metrics are the means.

    `precision` and `density` [N] belong to the images of `a`, `recall` and `coverage` [M] to those
    of `b`. An image's ball reaches to its k-th nearest neighbour in its own set, including the
    border.

    - precision (k = 3, Kynkäänniemi et al. 2019): 1 if the image of `a` is inside a ball of `b`.
    - recall (k = 3): 1 if the image of `b` is inside a ball of `a`.
    - density (k = 5, Naeem et al. 2020): the number of balls of `b` around the image of `a`,
      divided by k.
    - coverage (k = 5): 1 if the ball of the image of `b` contains an image of `a`.
    """

    precision: Features
    recall: Features
    density: Features
    coverage: Features


def manifold(a: Features, b: Features) -> Manifold:
    """Precision, recall, density and coverage of `a` [N, D] against `b` [M, D], per image.

    Raises UserError if a set has too few rows for five neighbours.
    """
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    if min(len(a), len(b)) <= NEAREST_DENSITY:
        raise UserError(
            f"precision, recall, density and coverage need at least {NEAREST_DENSITY + 1} images "
            f"in each set, got {len(a)} of the system and {len(b)} of the reference; use more "
            "images (--count, or a larger --reference)"
        )

    # Centre the features: with small numbers |x|² + |y|² − 2x·y loses no digits
    centre = b.mean(0)
    a = a - centre
    b = b - centre

    # Squared radii of the balls
    radii_a = _squared_radii(a, (NEAREST_PRECISION,))[:, 0]
    radii_b, wide_radii_b = _squared_radii(b, (NEAREST_PRECISION, NEAREST_DENSITY)).T

    # One pass over the matrix of distances between the sets
    precision = []
    density = []
    recall = np.zeros(len(b), bool)
    coverage = np.zeros(len(b), bool)
    starts = range(0, len(a), BLOCK)
    for start, squares in zip(starts, _squared_distances(a, b), strict=True):
        precision.append((squares <= radii_b).any(1))
        density.append((squares <= wide_radii_b).sum(1) / NEAREST_DENSITY)
        recall |= (squares <= radii_a[start : start + BLOCK, None]).any(0)
        coverage |= (squares <= wide_radii_b).any(0)

    return Manifold(
        precision=np.concatenate(precision).astype(np.float64),
        recall=recall.astype(np.float64),
        density=np.concatenate(density),
        coverage=coverage.astype(np.float64),
    )


def _squared_radii(x: Features, ks: Sequence[int]) -> Features:
    """[N, len(ks)]: squared distance of a row to its k-th nearest other row, plus rounding."""
    radii = []
    starts = range(0, len(x), BLOCK)
    for start, squares in zip(starts, _squared_distances(x, x), strict=True):
        # Index 0 of the sorted distances is always the row itself
        rows = np.arange(len(squares))
        squares[rows, start + rows] = -1
        partitioned = np.partition(squares, ks, axis=1)
        radii.append(partitioned[:, list(ks)])

    rounding = 1e-12 * np.square(x).sum(1).max()
    return np.concatenate(radii) + rounding


# ----------------------------------------------------------------------------- metrics per image


def cosine_similarity(a: Features, b: Features) -> Features:
    """[…]: the cosine of corresponding vectors of `a` and `b` […, D], in [−1, 1]."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    products = (a * b).sum(-1)
    return np.asarray(products / np.maximum(norms, 1e-12))


def clip_score(image_embeds: Features, text_embeds: Features) -> float:
    """Mean cosine between images [N, D] and their prompts [N, D], in [−1, 1].

    Hessel et al. 2021, without the factor 2.5.
    """
    return float(cosine_similarity(image_embeds, text_embeds).mean())


def patch_distance(a: Features, b: Features) -> Features:
    """[N]: 1 − cosine, averaged over corresponding patches of `a` and `b` [N, P, D], in [0, 2].

    DreamSim's distance (Fu et al. 2023) in form, with the given features.
    """
    return np.asarray(1 - cosine_similarity(a, b).mean(-1))


def cosine_distance(a: Features, b: Features) -> Features:
    """[N]: 1 − cosine of corresponding rows of `a` and `b` [N, D], in [0, 2].

    DreamSim's distance (Fu et al. 2023), with the given embeddings.
    """
    return np.asarray(1 - cosine_similarity(a, b))


def same_noise_distance(a: Features, b: Features) -> float:
    """Mean of 1 − cosine over all corresponding patches of `a` and `b` [N, P, D], in [0, 2].

    DreamSim's distance (Fu et al. 2023) in form, with the given features.
    """
    return float(1 - cosine_similarity(a, b).mean())


def diversity(features: Features, distance: Distance = patch_distance) -> Features:
    """[N]: the mean distance between all pairs of K images of one prompt.

    `features` [N, K, …]. DreamDiv is its mean over prompts, with DreamSim as the distance. Any
    distance (a [B, …], b [B, …]) → [B] can be used. Raises UserError if there is one image per
    prompt.
    """
    num_images = features.shape[1]
    if num_images < 2:
        raise UserError(
            "diversity needs at least two images of each prompt, got one; raise --num-noises"
        )

    distances = []
    for i in range(num_images):
        for j in range(i):
            distances.append(distance(features[:, i], features[:, j]))
    return np.asarray(np.mean(distances, axis=0))


def accuracy(correct: Sequence[bool]) -> float:
    """The share of True, in [0, 1]; NaN if there are no answers."""
    if len(correct) == 0:
        return float("nan")
    return float(np.mean(np.asarray(correct, np.float64)))


def check_features(features: Features, name: str) -> None:
    """Raises UserError if some of the features [N, …] are not finite.

    `name`: the feature network, for the message, which counts the images and names the first.
    """
    finite = np.isfinite(features).reshape(len(features), -1).all(1)
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise UserError(
            f"{name}: the features of {len(bad)} of {len(features)} images are not finite; the "
            f"first is image {bad[0]}. Look at that image, and check that the feature network's "
            "weights are complete and undamaged."
        )
