"""Heads fitted to two-alternative forced choices, as in LPIPS (Zhang et al. 2018, section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.runtime.trainer import FitConfig, fit, shuffled

EPS = 0.1  # in the ratios of distances


@dataclass(frozen=True)
class JudgedDifferences:
    """The network's outputs for N triplets; distances are linear in these numbers.

    `d0`, `d1` [N, ΣC] float32: the `channel_differences` of p0 and p1 from the reference, all
    layers concatenated. `judge` [N]: the share of people, in [0, 1], who found p1 more similar.
    """

    d0: Tensor
    d1: Tensor
    judge: Tensor

    def __len__(self) -> int:
        return len(self.judge)

    def select(self, rows: Tensor) -> JudgedDifferences:
        """The triplets of `rows`, numbers or a mask."""
        return JudgedDifferences(self.d0[rows], self.d1[rows], self.judge[rows])


class Ranker(nn.Module):
    """Heads w ≥ 0 [ΣC], and the small network that predicts a choice from two distances.

    Only the heads are kept after the fit.
    """

    def __init__(self, heads: Tensor, width: int = 32) -> None:
        super().__init__()
        self.heads = nn.Parameter(heads.clone())
        self.body = nn.Sequential(
            nn.Linear(5, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def forward(self, differences0: Tensor, differences1: Tensor) -> Tensor:
        """Logits [B] that p1 is more similar, from the differences of p0 and p1, [B, ΣC] each."""
        d0 = differences0 @ self.heads
        d1 = differences1 @ self.heads
        inputs = torch.stack([d0, d1, d0 - d1, d0 / (d1 + EPS), d1 / (d0 + EPS)], 1)  # [B, 5]
        return self.body(inputs)[:, 0]

    @torch.no_grad()
    def clamp(self) -> None:
        """Projects the heads to w ≥ 0."""
        self.heads.clamp_(min=0)


def two_afc(d0: Tensor, d1: Tensor, judge: Tensor) -> float:
    """The 2AFC score: the mean share of people who agree with the distance's choice.

    A tie counts half (Zhang et al. 2018, section 5). `d0`, `d1`: distances [N] of p0 and p1;
    `judge` [N]: the share who chose p1.
    """
    chooses_p1 = 0.5 * (1 + (d0 - d1).sign())  # 1 if p1 is nearer, 0.5 for a tie
    agreement = chooses_p1 * judge + (1 - chooses_p1) * (1 - judge)
    return float(agreement.mean())


def flat_then_linear(progress: float, peak: float) -> float:
    """The peak learning rate for the first half, then linear to zero."""
    return peak * min(1.0, 2 * (1 - progress))


def calibrate_heads(
    judged: JudgedDifferences,
    heads: list[Tensor],
    *,
    folder: Path,
    stage: str = "calibrate",
    epochs: int = 10,
    batch_size: int = 50,
    peak_lr: float = 1e-4,
    seed: int = 0,
) -> list[Tensor]:
    """Fits new heads to `judged`, starting from `heads`; returns one tensor per layer.

    The loss is the binary cross-entropy against the share of people. Adam with β1 = 0.5, no
    dropout; heads are clamped after each step. The state is saved in `folder/<stage>.safetensors`.
    """
    torch.manual_seed(seed)
    ranker = Ranker(torch.cat(heads))
    count = len(judged)

    def loss(numbers: range) -> Tensor:
        batch = judged.select(torch.tensor(shuffled(numbers, count, seed)))
        logits = ranker(batch.d0, batch.d1)
        return F.binary_cross_entropy_with_logits(logits, batch.judge)

    # Fit
    config = FitConfig(
        num_samples=epochs * count,
        batch_size=min(batch_size, count),
        peak_lr=peak_lr,
        seed=seed,
        ema_decay=0.0,
        weight_decay=0.0,
        betas=(0.5, 0.999),
        max_grad_norm=math.inf,
        schedule=flat_then_linear,
    )
    fit(stage, ranker, loss, config, folder, after_step=ranker.clamp)
    return list(ranker.heads.detach().split([len(head) for head in heads]))
