"""Heads from two-alternative forced choices, as LPIPS calibrates them (Zhang et al. 2018, section 4.2)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.runtime.trainer import FitConfig, fit, shuffled

EPS = 0.1


class Ranker(nn.Module):
    """Heads w ≥ 0 [ΣC] and the small network that turns two distances into a choice; only the heads are kept."""

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
        """Logits [B] that p1 is the nearer, from what the heads weigh, [B, ΣC] each."""
        d0, d1 = differences0 @ self.heads, differences1 @ self.heads
        return self.body(torch.stack([d0, d1, d0 - d1, d0 / (d1 + EPS), d1 / (d0 + EPS)], 1))[:, 0]

    @torch.no_grad()
    def clamp(self) -> None:
        self.heads.clamp_(min=0)


def two_afc(d0: Tensor, d1: Tensor, judge: Tensor) -> float:
    """Mean share of people who agree with the distance's choice; a tie counts half (Zhang et al. 2018, section 5)."""
    choice = 0.5 * (1 + (d0 - d1).sign())  # 1 where p1 is the nearer
    return float((choice * judge + (1 - choice) * (1 - judge)).mean())


def flat_then_linear(progress: float, peak: float) -> float:
    """The peak for the first half, then a line to zero."""
    return peak * min(1.0, 2 * (1 - progress))


def calibrate_heads(
    differences0: Tensor,
    differences1: Tensor,
    judge: Tensor,
    heads: list[Tensor],
    *,
    folder: Path,
    stage: str = "calibrate",
    epochs: int = 10,
    batch_size: int = 50,
    peak_lr: float = 1e-4,
    seed: int = 0,
) -> list[Tensor]:
    """New heads, one tensor a layer. `differences0`, `differences1` [N, ΣC] of p0 and p1 to ref, `judge` [N] in [0, 1].

    Binary cross-entropy against the share of people; Adam with β1 = .5, no dropout; heads clamped after each step.
    Progress goes to `folder/<stage>.safetensors`.
    """
    torch.manual_seed(seed)
    ranker = Ranker(torch.cat(heads))
    count = len(judge)

    def loss(numbers: range) -> Tensor:
        places = torch.tensor(shuffled(numbers, count, seed))
        return F.binary_cross_entropy_with_logits(
            ranker(differences0[places], differences1[places]), judge[places]
        )

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
