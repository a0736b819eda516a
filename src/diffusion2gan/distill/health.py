"""Is this curve normal? What a run tells of itself at every step, and the warnings when it leaves its bands."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

SPAN = 100  # steps that a running average remembers
SETTLED = 2 * SPAN  # values of a kind before any warning: the first ones are forgotten by then
MAX_SKIPPED_IN_A_ROW = 10

D_TOO_STRONG, D_AT_CHANCE, DRIFT, DIVERGES, SKIPS = (
    "the discriminator wins outright",
    "the discriminator cannot tell",
    "saturation drift",
    "divergence",
    "many skipped steps",
)
REMEDIES = {
    D_TOO_STRONG: "it tells nearly every fake: the student learns little from it. Raise r1_weight or mix_share, or lower "
    "discriminator_learning_rate.",
    D_AT_CHANCE: "real and fake look alike to it: the student is done, or it is too weak. Raise "
    "discriminator_learning_rate, or lower r1_weight.",
    DRIFT: "the student's latents have another mean or spread than the teacher's: colours shift or saturate. Lower "
    "adversarial_weight, or raise r1_weight.",
    DIVERGES: "the distance to the teacher has doubled since its best. Lower learning_rate or adversarial_weight and "
    "start anew, or resume an earlier checkpoint.",
    SKIPS: "gradients are often not finite. Lower the learning rates, or use precision=float32.",
}


def latent_statistics(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """How the student's latents [B, C, h, w] lie beside the teacher's.

    `latent_shift`: the largest difference of a channel's means, in the teacher's standard deviations of that channel
    (colour drift). `latent_std_ratio`: student's over teacher's standard deviation, the mean over channels
    (saturation; 1 is right, below is washed out).
    """
    ours, theirs = (
        x.detach().double().transpose(0, 1).flatten(1) for x in (student, teacher)
    )  # [C, B·h·w]
    std = theirs.std(1).clamp_min(1e-12)
    shift = ((ours.mean(1) - theirs.mean(1)).abs() / std).max()
    return {"latent_shift": float(shift), "latent_std_ratio": float((ours.std(1) / std).mean())}


def accuracy(logits: list[Tensor], real: bool, rows: Tensor | None = None) -> float | None:
    """The share of places that D gets right, the mean over heads; of `rows` [B] bool alone. None of no rows."""
    chosen = logits if rows is None else [x[rows.to(x.device)] for x in logits]
    if len(chosen[0]) == 0:
        return None
    right = [(x > 0 if real else x < 0).double().mean() for x in chosen]
    return float(torch.stack(right).mean())


def logit_means(logits: list[Tensor]) -> list[float]:
    """One mean a head, in the heads' order."""
    return [float(x.detach().double().mean()) for x in logits]


def find_warnings(average: dict[str, float], lowest_loss: float) -> set[str]:
    """The bands that these running averages have left. `lowest_loss`: the lowest running distance so far."""
    found = set()
    if (
        "accuracy_real" in average
        and average["accuracy_real"] + average.get("accuracy_fake", 0.0) > 2 * 0.95
    ):
        found.add(D_TOO_STRONG)
    if average.get("accuracy", 1.0) < 0.52:
        found.add(D_AT_CHANCE)
    if (
        average.get("latent_shift", 0.0) > 0.25
        or not 0.8 <= average.get("latent_std_ratio", 1.0) <= 1.2
    ):
        found.add(DRIFT)
    if average.get("loss", 0.0) > 2 * lowest_loss:
        found.add(DIVERGES)
    if average.get("skipped", 0.0) > 0.05:
        found.add(SKIPS)
    return found


@dataclass
class Health:
    """Running averages of what is logged; saved with the run, so that a resumed one warns alike."""

    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    average: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lowest_loss: float = math.inf
    told: list[str] = field(default_factory=list)

    def record(self, entry: dict[str, Any], skipped: bool) -> list[str]:
        """Takes one step's numbers in; returns the warnings, name and remedy, that were not there before it."""
        self.steps += 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        for key, value in (entry | {"skipped": float(skipped)}).items():
            if isinstance(value, float) and math.isfinite(value):
                self._average(key, value)
        settled = {key: value for key, value in self.average.items() if self.counts[key] >= SETTLED}
        self.lowest_loss = min(self.lowest_loss, settled.get("loss", math.inf))
        now = find_warnings(settled, self.lowest_loss)
        new = sorted(now - set(self.told))
        self.told = sorted(now)
        return [f"{name}: {REMEDIES[name]}" for name in new]

    def _average(self, key: str, value: float) -> None:
        """The plain mean of the first SPAN values, an exponential one after them."""
        self.counts[key] = min(self.counts.get(key, 0) + 1, SETTLED)
        before = self.average.get(key, 0.0)
        self.average[key] = before + (value - before) / min(self.counts[key], SPAN)

    def line(self) -> str:
        """The live status: what the progress bar says beside count, pace and time left."""
        average = self.average
        parts = [f"loss {average.get('loss', math.nan):.4f}"]
        if "accuracy_real" in average:
            parts.append(
                f"D right on {average['accuracy_real']:.0%} real {average.get('accuracy_fake', 0):.0%} fake"
            )
        if "r1" in average:
            parts.append(f"R1 {average['r1']:.3g}")
        if self.skipped:
            parts.append(f"{self.skipped} skipped")
        return " · ".join([*parts, *self.told])

    def state(self) -> dict[str, Any]:
        """JSON; every number comes back as it was."""
        return asdict(self) | {
            "lowest_loss": None if math.isinf(self.lowest_loss) else self.lowest_loss
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Health:
        return cls(
            **state
            | {"lowest_loss": math.inf if state["lowest_loss"] is None else state["lowest_loss"]}
        )
