"""The headline of a report: how much faster each system is than the teacher, and what it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion2gan.compare.table import METRICS, TIME, Column, get_interval, get_number

# Metrics of which a share is kept, because their zero means nothing; and distances
SHARES = {"clip_score": "CLIP score", "attribute_accuracy": "attribute accuracy"}
DISTANCE = "frechet_distance"
# Times are marked if other processes used more than this share of the machine's cores
LOADED_SHARE = 0.1


@dataclass(frozen=True)
class Headline:
    """A system against the reference: `times faster`, and sentences about its quality."""

    system: Column
    reference: Column
    speedup: float
    kept: Mapping[str, float]  # share of the reference's metric, by the metric's name
    distance: str  # the Fréchet distances in words; empty if one is not known

    @property
    def title(self) -> str:
        """`32× faster than teacher, 98.5 % of its CLIP score`."""
        text = f"{format_speedup(self.speedup)} faster than {self.reference.name}"
        for name, share in list(self.kept.items())[:1]:
            text += f", {100 * share:.3g} % of its {name}"
        return text

    @property
    def details(self) -> str:
        """Times, steps and the other metrics."""
        time = METRIC_OF[TIME]
        sides = []
        for column in (self.system, self.reference):
            seconds = get_number(column, TIME)
            assert seconds is not None
            note = f"{column.note}, " if column.note else ""
            sides.append(f"{column.name} ({note}{time.text(seconds)} per image)")
        parts = [" against ".join(sides)]
        for name, share in list(self.kept.items())[1:]:
            parts.append(f"{100 * share:.3g} % of its {name}")
        if self.distance:
            parts.append(self.distance)
        return "; ".join(parts)


METRIC_OF = {metric.key: metric for metric in METRICS}


def compute_headlines(columns: Sequence[Column]) -> list[Headline]:
    """A headline of every system that is faster than the reference, the best student first.

    The reference is the slowest system that is called a teacher, or the slowest of all.
    """
    timed = []
    for column in columns:
        seconds = get_number(column, TIME)
        if seconds is not None and math.isfinite(seconds) and seconds > 0:
            timed.append((seconds, column))
    teachers = [(seconds, column) for seconds, column in timed if is_called(column, "teacher")]
    if not timed:
        return []
    reference_s, reference = max(teachers or timed, key=lambda item: item[0])

    headlines = []
    for seconds, column in timed:
        if column is reference or reference_s / seconds < 1.05:
            continue
        kept = {}
        for key, name in SHARES.items():
            value, whole = get_number(column, key), get_number(reference, key)
            if value is not None and whole is not None and whole > 0:
                kept[name] = value / whole
        headlines.append(
            Headline(
                column, reference, reference_s / seconds, kept, compare_distance(column, reference)
            )
        )
    return sorted(headlines, key=_rank)


def compare_distance(column: Column, reference: Column) -> str:
    """`Fréchet distance 1.75 against 1.5, intervals overlap`; empty if one is not known."""
    metric = METRIC_OF[DISTANCE]
    value, other = get_number(column, DISTANCE), get_number(reference, DISTANCE)
    if value is None or other is None:
        return ""
    text = f"{metric.title} {metric.text(value)} against {metric.text(other)}"
    interval, other_interval = get_interval(column, DISTANCE), get_interval(reference, DISTANCE)
    if interval is not None and other_interval is not None:
        overlap = interval[0] <= other_interval[1] and other_interval[0] <= interval[1]
        text += ", intervals overlap" if overlap else ", intervals apart"
    return text


def _rank(headline: Headline) -> tuple[bool, float]:
    """Students first, then by the Fréchet distance, or by what is kept."""
    column = headline.system
    distance = get_number(column, DISTANCE)
    if distance is None:
        distance = -next(iter(headline.kept.values()), 0.0)
    return not is_called(column, "student"), distance


def is_called(column: Column, word: str) -> bool:
    return word in column.name.lower()


def format_speedup(speedup: float) -> str:
    """`32×`, or `3.2×` below ten."""
    return f"{speedup:.0f}×" if speedup >= 9.95 else f"{speedup:.1f}×"


# ------------------------------------------------------------------------------ Where it was timed


def other_load(column: Column) -> float | None:
    """The share of the cores that other processes used while a system was timed, if known."""
    value = column.metrics.get("other_load")
    return float(value) if isinstance(value, float | int) and not isinstance(value, bool) else None


def describe_load(column: Column) -> str:
    """`loaded: 43 %` if the times of a column are not to be trusted; else empty."""
    share = other_load(column)
    if share is None or share <= LOADED_SHARE:
        return ""
    return f"loaded: {100 * share:.0f} %"


def load_note(columns: Sequence[Column]) -> str:
    """A sentence about the times that were measured beside other work; else empty."""
    loaded = [column for column in columns if describe_load(column)]
    if not loaded:
        return ""
    names = ", ".join(f"{c.name} ({100 * (other_load(c) or 0):.0f} %)" for c in loaded)
    return (
        f"Measured on a loaded machine: other processes used a part of its cores while these were "
        f"timed: {names}. Measure them again on an idle machine before you compare times."
    )


def describe_machines(columns: Sequence[Column]) -> list[str]:
    """Where and when the systems were timed: one line per machine."""
    lines: dict[str, list[Any]] = {}
    for column in columns:
        machine = column.metrics.get("machine")
        if machine:
            lines.setdefault(str(machine), []).append(column)
    described = []
    for machine, on_it in lines.items():
        dates = sorted({str(column.metrics.get("measured_at", "")) for column in on_it} - {""})
        when = ""
        if dates:
            when = f", {dates[0]}" if len(dates) == 1 else f", {dates[0]} to {dates[-1]}"
        which = ""
        if len(lines) > 1:
            which = f"{', '.join(column.name for column in on_it)}: "
        described.append(f"{which}{machine}{when}")
    return described
