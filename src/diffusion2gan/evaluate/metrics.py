"""Metrics: pure functions of feature arrays, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffusion2gan.errors import UserError

Features = NDArray[np.floating]


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance between Gaussians fitted to `a` [N, D] and `b` [M, D] (Heusel et al. 2017, eq. 6).

    |μa−μb|² + tr(Σa + Σb − 2(ΣaΣb)^½), the last trace taken as the nuclear norm of Σa^½ Σb^½, which is symmetric in
    a and b and needs no matrix logarithm. Raises UserError with fewer than two rows.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(a), len(b)) < 2:
        raise UserError(f"the Fréchet distance needs two pictures a side, got {len(a)} and {len(b)}; raise --count")
    root_a, root_b = _centred(a), _centred(b)  # Σ = rootᵀ root
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    squares = np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross
    return float(max(0.0, np.square(a.mean(0) - b.mean(0)).sum() + squares))


def _centred(x: Features) -> Features:
    """A square root R of the covariance of `x` (RᵀR = Σ, unbiased), at most D rows."""
    rows = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows


def cosine(a: Features, b: Features) -> Features:
    """[N] cosine of corresponding rows."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, 1e-12))


def clip_score(image_embeds: Features, text_embeds: Features) -> float:
    """Mean cosine between pictures [N, D] and their prompts [N, D] (Hessel et al. 2021, without the factor 2.5)."""
    return float(cosine(image_embeds, text_embeds).mean())


def same_noise_distance(a: Features, b: Features) -> float:
    """Mean of 1 − cosine over corresponding patches [N, P, D]: DreamSim's form, with the features given."""
    return float(1 - cosine(a, b).mean())


def share(right: Sequence[bool]) -> float:
    return float(np.mean(np.asarray(right, np.float64))) if len(right) else float("nan")
