"""The health of a run: running averages of what is logged, and warnings with their remedies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.runtime.transfer import to_device

AVERAGE_STEPS = 100  # number of steps that a running average covers
# Values before a quantity may cause a warning: by then the first ones have little weight
MIN_VALUES = 2 * AVERAGE_STEPS
MAX_SKIPPED_IN_A_ROW = 10

D_TOO_STRONG = "the discriminator is too strong"
D_AT_CHANCE = "the discriminator is at chance"
DRIFT = "saturation drift"
DIVERGES = "divergence"
SKIPS = "many skipped steps"

REMEDIES = {
    D_TOO_STRONG: (
        "it classifies nearly all latents correctly, so the student learns little from it. "
        "Raise r1_weight or mix_share, or lower discriminator_learning_rate."
    ),
    D_AT_CHANCE: (
        "it cannot distinguish real and fake latents: either the student has converged, or the "
        "discriminator is too weak. Raise discriminator_learning_rate, or lower r1_weight."
    ),
    DRIFT: (
        "the student's latents have another mean or standard deviation than the teacher's, so "
        "colours shift or saturate. Lower adversarial_weight, or raise r1_weight."
    ),
    DIVERGES: (
        "the distance to the teacher has doubled since its lowest value. Lower learning_rate or "
        "adversarial_weight and start a new run, or resume from an earlier checkpoint."
    ),
    SKIPS: ("gradients are often not finite. Lower the learning rates, or use precision=float32."),
}


def latent_statistics(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Compares the distributions of the student's and the teacher's latents, both [B, C, h, w].

    `latent_shift`: the largest difference between the means of a channel, in units of the teacher's
    standard deviation of that channel; it shows colour drift. `latent_std_ratio`: the student's
    standard deviation divided by the teacher's, averaged over channels; it shows saturation
    (1 is right, below 1 is washed out). Both are scalars on the latents' device.
    """
    student_values = student.detach().double().transpose(0, 1).flatten(1)  # [C, B·h·w]
    teacher_values = teacher.detach().double().transpose(0, 1).flatten(1)

    std = teacher_values.std(1).clamp_min(1e-12)
    shift = (student_values.mean(1) - teacher_values.mean(1)).abs() / std
    std_ratio = student_values.std(1) / std
    return {"latent_shift": shift.max(), "latent_std_ratio": std_ratio.mean()}


def accuracy(logits: Sequence[Tensor], real: bool, rows: Tensor | None = None) -> Tensor | None:
    """The share of logits with the right sign, averaged over heads: a scalar on their device.

    `logits` has one map [B, 1, h, w] per head; `rows` [B] bool, on the CPU, selects samples. None
    if it selects none.
    """
    if rows is None:
        rows = torch.ones(len(logits[0]), dtype=torch.bool)
    num_rows = int(rows.sum())
    if num_rows == 0:
        return None

    # Correct logits per head and sample, [heads, B], and all logits of the selected samples. The
    # counts are integers, so that the order of summation does not matter.
    device = logits[0].device
    correct = []
    totals = []
    for head in logits:
        has_right_sign = head > 0 if real else head < 0
        correct.append(has_right_sign.flatten(1).sum(1))
        totals.append(num_rows * head[0].numel())
    num_correct = torch.stack(correct).double() * to_device(rows.double(), device)
    shares = num_correct.sum(1) / to_device(torch.tensor(totals).double(), device)
    return shares.mean()


def logit_means(logits: Sequence[Tensor]) -> Tensor:
    """The mean logit of each head, [heads]."""
    return torch.stack([head.detach().double().mean() for head in logits])


def discriminator_metrics(
    real: Sequence[Tensor], fake: Sequence[Tensor], mixed: Tensor
) -> dict[str, Any]:
    """How well D classifies real and fake latents, as tensors on their device.

    `mixed` [B] bool, on the CPU: which of the fakes are mismatched real latents.
    """
    accuracy_real = accuracy(real, True)
    accuracy_all_fakes = accuracy(fake, False)
    assert accuracy_real is not None and accuracy_all_fakes is not None

    return {
        "accuracy": (accuracy_real + accuracy_all_fakes) / 2,
        "accuracy_real": accuracy_real,
        "accuracy_fake": accuracy(fake, False, ~mixed),
        "accuracy_mixed": accuracy(fake, False, mixed),
        "logits_real": logit_means(real),
        "logits_fake": logit_means(fake),
    }


def find_warnings(average: dict[str, float], lowest_loss: float) -> set[str]:
    """The warnings that these running averages give.

    `lowest_loss`: the lowest running average of the distance so far.
    """
    found = set()

    # Discriminator
    if "accuracy_real" in average:
        accuracies = average["accuracy_real"] + average.get("accuracy_fake", 0.0)
        if accuracies > 2 * 0.95:
            found.add(D_TOO_STRONG)
    if average.get("accuracy", 1.0) < 0.52:
        found.add(D_AT_CHANCE)

    # Student
    shift = average.get("latent_shift", 0.0)
    std_ratio = average.get("latent_std_ratio", 1.0)
    if shift > 0.25 or not 0.8 <= std_ratio <= 1.2:
        found.add(DRIFT)
    if average.get("loss", 0.0) > 2 * lowest_loss:
        found.add(DIVERGES)

    # Either network
    if average.get("skipped", 0.0) > 0.05:
        found.add(SKIPS)
    return found


@dataclass
class Health:
    """Running averages of the logged values, and the warnings that are active.

    It is saved with the run, so that a resumed run warns at the same steps.
    """

    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    average: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lowest_loss: float = math.inf
    active_warnings: list[str] = field(default_factory=list)

    def record(self, entry: dict[str, Any], skipped: bool) -> list[str]:
        """Adds one step's log entry; returns the warnings (name and remedy) that are new."""
        self.steps += 1
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0

        # Running averages
        for key, value in entry.items():
            if isinstance(value, float) and math.isfinite(value):
                self._update_average(key, value)
        self._update_average("skipped", float(skipped))

        # Warnings: a quantity counts once it has enough values
        settled = {
            key: value for key, value in self.average.items() if self.counts[key] >= MIN_VALUES
        }
        self.lowest_loss = min(self.lowest_loss, settled.get("loss", math.inf))
        active = find_warnings(settled, self.lowest_loss)
        new = sorted(active - set(self.active_warnings))
        self.active_warnings = sorted(active)
        return [f"{name}: {REMEDIES[name]}" for name in new]

    def _update_average(self, key: str, value: float) -> None:
        """The plain mean of the first AVERAGE_STEPS values, an exponential average after them."""
        count = min(self.counts.get(key, 0) + 1, MIN_VALUES)
        previous = self.average.get(key, 0.0)
        self.counts[key] = count
        self.average[key] = previous + (value - previous) / min(count, AVERAGE_STEPS)

    def status(self) -> str:
        """The last part of the progress bar's line: running averages and active warnings."""
        average = self.average
        items = [f"loss {average.get('loss', math.nan):.4f}"]
        if "accuracy_real" in average:
            real = average["accuracy_real"]
            fake = average.get("accuracy_fake", 0)
            items.append(f"D accuracy {real:.0%} real {fake:.0%} fake")
        if "r1" in average:
            items.append(f"R1 {average['r1']:.3g}")
        if self.skipped:
            items.append(f"{self.skipped} skipped")
        return " · ".join([*items, *self.active_warnings])

    def state(self) -> dict[str, Any]:
        """As a JSON value (which has no infinity), from which every number is restored exactly."""
        state = asdict(self)
        if math.isinf(self.lowest_loss):
            state["lowest_loss"] = None
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Health:
        state = dict(state)
        if state["lowest_loss"] is None:
            state["lowest_loss"] = math.inf
        if "told" in state:  # the field's name in runs of version 0.1
            state["active_warnings"] = state.pop("told")
        return cls(**state)
