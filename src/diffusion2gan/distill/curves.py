"""A run's logged numbers as curves of few points, and their charts as SVG text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from importlib.resources import files

NUM_SECTIONS = 200  # of a run; each is one point of a curve, the mean over its steps

Curve = Sequence[tuple[float, float]]  # (pairs seen, value)


class Curves:
    """Means of every logged number over sections of a run; its size does not grow with the log."""

    def __init__(self, total_pairs: int) -> None:
        self._section_size = total_pairs / NUM_SECTIONS
        # By key and section: number of values, sum of pairs seen, sum of values
        self._sums: dict[str, dict[int, tuple[int, float, float]]] = {}

    def add(self, line: Mapping[str, object]) -> None:
        """Adds a line of log.jsonl."""
        pairs_seen = line["pairs_seen"]
        assert isinstance(pairs_seen, int)
        section = int((pairs_seen - 1) / self._section_size)
        for key, value in line.items():
            if not isinstance(value, float) or not math.isfinite(value):
                continue
            sections = self._sums.setdefault(key, {})
            count, sum_x, sum_y = sections.get(section, (0, 0.0, 0.0))
            sections[section] = (count + 1, sum_x + pairs_seen, sum_y + value)

    def curve(self, key: str) -> Curve:
        """The points of a number; none if it was never logged."""
        sections = self._sums.get(key, {})
        points = []
        for section in sorted(sections):
            count, sum_x, sum_y = sections[section]
            points.append((sum_x / count, sum_y / count))
        return points


@dataclass(frozen=True)
class Panel:
    """A chart: its title, a remark, and its curves, label → key of log.jsonl.

    `low` and `high` are the ends of the axis, if these do not depend on the values.
    """

    title: str
    keys: Mapping[str, str]
    remark: str = ""
    low: float | None = None
    high: float | None = None
    logarithmic: bool = False


PANELS = (
    Panel(
        "Distance to the teacher",
        {"loss": "loss"},
        "Falls throughout. Its scale depends on teacher and loss.",
        low=0.0,
    ),
    Panel(
        "GAN losses",
        {"student": "gan_loss", "discriminator": "d_loss"},
        "The student's may rise while the distance falls.",
        low=0.0,
    ),
    Panel(
        "Accuracy of the discriminator",
        {"real": "accuracy_real", "fake": "accuracy_fake", "mixed": "accuracy_mixed"},
        "Neither near 1 on all, nor near one half.",
        low=0.0,
        high=1.0,
    ),
    Panel(
        "Student's latents against the teacher's",
        {"shift of the mean": "latent_shift", "ratio of the spread": "latent_std_ratio"},
        "The shift below 0.25, the ratio between 0.8 and 1.2.",
        low=0.0,
        high=1.5,
    ),
    Panel(
        "Gradient norms before clipping",
        {"student": "grad_norm", "discriminator": "d_grad_norm"},
        logarithmic=True,
    ),
    Panel(
        "R1 penalty, squared norm",
        {"R1": "r1"},
        "May grow by orders of magnitude. Its scale depends on the number of logits.",
        logarithmic=True,
    ),
    Panel(
        "Learning rate",
        {"student": "learning_rate", "discriminator": "d_learning_rate"},
        low=0.0,
    ),
    Panel("Pairs per second", {"pairs/s": "pairs_per_s"}, low=0.0),
)


@lru_cache(maxsize=1)
def healthy_curves() -> dict[str, Curve]:
    """The curves of the shipped student's run, by key of log.jsonl.

    They are drawn in docs/images/reference_curves.svg; `benchmarks/reference_curves.py` writes
    both.
    """
    text = files("diffusion2gan.distill").joinpath("healthy_run.json").read_text("utf-8")
    curves: dict[str, Curve] = json.loads(text)
    return curves


# ---------------------------------------------------------------------------------------- Charts

# Sizes in pixels: of the axes, and of the space for the labels
WIDTH, HEIGHT = 380, 150
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 8, 24


def draw_chart(panel: Panel, curves: Mapping[str, Curve], last: float, label: str) -> str:
    """An SVG element of a panel's curves, by label, from 0 to `last` pairs.

    Lines have the classes `s0`, `s1`, …, in the order of the panel's keys. `label` is the text for
    those who do not see the chart. Empty if no curve has a point that can be drawn.
    """
    # Values: a logarithmic axis has only positive ones
    shown: dict[str, list[tuple[float, float]]] = {}
    for name, curve in curves.items():
        shown[name] = [(x, y) for x, y in curve if not panel.logarithmic or y > 0]
    values = [y for curve in shown.values() for _, y in curve]
    if not values:
        return ""
    low, high = compute_range(panel, values)

    def to_x(pairs_seen: float) -> float:
        return LEFT + WIDTH * min(pairs_seen / last, 1.0)

    def to_y(value: float) -> float:
        share = (scale(value, panel) - scale(low, panel)) / (scale(high, panel) - scale(low, panel))
        return TOP + HEIGHT * (1 - min(max(share, 0.0), 1.0))

    # Axes
    elements = []
    for tick in compute_ticks(panel, low, high):
        y = to_y(tick)
        elements.append(f'<path class="line" d="M{LEFT} {y:.1f}h{WIDTH}"/>')
        elements.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    bottom = TOP + HEIGHT + 18
    elements.append(f'<text x="{LEFT}" y="{bottom}">0</text>')
    elements.append(
        f'<text x="{LEFT + WIDTH}" y="{bottom}" text-anchor="end">{last:,.0f} pairs</text>'
    )

    # Curves
    for index, curve in enumerate(shown.values()):
        points = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in curve)
        if len(curve) == 1:
            x, y = curve[0]
            elements.append(
                f'<circle class="s{index}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3"/>'
            )
        elif curve:
            elements.append(f'<polyline class="s{index}" points="{points}"/>')

    size = f"0 0 {LEFT + WIDTH + RIGHT} {TOP + HEIGHT + BOTTOM}"
    return (
        f'<svg viewBox="{size}" role="img" aria-label="{escape(label)}">{"".join(elements)}</svg>'
    )


def scale(value: float, panel: Panel) -> float:
    return math.log10(value) if panel.logarithmic else value


def compute_range(panel: Panel, values: Sequence[float]) -> tuple[float, float]:
    """The ends of the vertical axis: the panel's, or such that all values are inside."""
    if panel.logarithmic:
        low = 10.0 ** math.floor(math.log10(min(values)))
        high = 10.0 ** math.ceil(math.log10(max(values)))
        return low, max(high, 10 * low)

    low = min(values) if panel.low is None else panel.low
    high = max(values) if panel.high is None else panel.high
    high = max(high, max(values))
    if high <= low:
        high = low + (abs(low) or 1.0)
    return low, high


def compute_ticks(panel: Panel, low: float, high: float) -> list[float]:
    """Powers of ten, at most five, or multiples of a round number."""
    if panel.logarithmic:
        first = round(math.log10(low))
        last = round(math.log10(high))
        every = -(-(last - first) // 4)
        return [10.0**power for power in range(first, last + 1, every)]

    # At most five intervals of 1, 2 or 5 times a power of ten
    target = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(target))
    spacing = min(step * power for step in (1, 2, 5, 10) if step * power >= target * 0.9999)
    first = math.ceil(low / spacing - 1e-9)
    last = math.floor(high / spacing + 1e-9)
    return [number * spacing for number in range(first, last + 1)]
