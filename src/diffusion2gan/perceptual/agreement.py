"""How well one distance reproduces another: rank correlation, 2AFC agreement, gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two sets of N numbers, in [−1, 1]."""
    ranks = torch.stack([mean_ranks(a.flatten()), mean_ranks(b.flatten())])
    return float(torch.corrcoef(ranks)[0, 1])


def mean_ranks(values: Tensor) -> Tensor:
    """The ranks 0 … N − 1 of N numbers, float64; equal numbers share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts.double() - 1) / 2)[inverse]


def choice_agreement(a: Tensor, b: Tensor) -> float:
    """The share of two-alternative forced choices on which two distances agree.

    `a`, `b` [N, K]: the distances of K perturbations to each of N references. Every two
    perturbations of a reference are a choice of the nearer one; a tie counts half.
    """
    first, second = torch.triu_indices(a.shape[1], a.shape[1], offset=1)
    choice_a = (a[:, first] - a[:, second]).sign()
    choice_b = (b[:, first] - b[:, second]).sign()
    return float((0.5 * (1 + choice_a * choice_b)).mean())


def gradient_cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of each sample's two gradients, [B], from [B, …] each."""
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)
