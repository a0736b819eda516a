"""The numbers of a comparison: one row a metric, one cell a system, the best marked; as cells and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from PIL import Image

MISSING = "–"
TIME = "seconds_per_image"


@dataclass(frozen=True)
class Column:
    """One system of a comparison.

    `images`: one PIL picture a prompt (None where missing); `metrics`: what `evaluate` wrote, may be empty;
    `note`: a few words such as '50 steps'.
    """

    name: str
    images: Sequence[Image.Image | None]
    metrics: Mapping[str, Any]
    note: str = ""


class Metric(NamedTuple):
    """How a number of evaluate's is shown: `scale` × value in `form`, with its `unit`."""

    key: str
    title: str
    better: Literal["lower", "higher"]
    form: str = ".4g"
    unit: str = ""
    scale: float = 1.0

    def text(self, value: float) -> str:
        return f"{self.scale * value:{self.form}}{self.unit}"


METRICS = (
    Metric("frechet_distance", "Fréchet distance", "lower"),
    Metric("frechet_distance_clip", "Fréchet distance, CLIP", "lower"),
    Metric("kernel_distance", "Kernel distance (KID)", "lower"),
    Metric("cmmd", "CMMD", "lower"),
    Metric("patch_frechet_distance", "Fréchet distance, patches", "lower"),
    Metric("clip_score", "CLIP score", "higher"),
    Metric(
        "attribute_accuracy", "Attribute accuracy", "higher", ".1f", " %", 100.0
    ),  # stored as a share in [0, 1]
    Metric("precision", "Precision", "higher", ".3f"),
    Metric("recall", "Recall", "higher", ".3f"),
    Metric("density", "Density", "higher", ".3f"),
    Metric("coverage", "Coverage", "higher", ".3f"),
    Metric("diversity", "Diversity", "higher"),
    Metric("same_noise_distance", "Same-noise distance", "lower"),
    Metric(TIME, "Time per image", "lower", ".3g", " s"),
    Metric("seconds_per_image_p90", "Time per image, 90th percentile", "lower", ".3g", " s"),
    Metric("images_per_second", "Images per second", "higher", ".3g"),
    Metric("peak_memory_bytes", "Peak memory", "lower", ".3g", " GiB", 2.0**-30),
)
NOT_OTHER = {"intervals", "protocol", *(metric.key for metric in METRICS)}


class Cell(NamedTuple):
    """One number of the table: its text, its interval's, whether it is the best of its row or not told from it."""

    text: str
    best: bool = False
    interval: str = ""
    tied: bool = False


def number(column: Column, key: str) -> float | None:
    """A column's number, or None where it has none. A distance of zero to itself is no merit and is left out."""
    value = column.metrics.get(key)
    if isinstance(value, bool) or not isinstance(value, float | int):
        return None
    return None if (key, value) == ("same_noise_distance", 0) else float(value)


def interval(column: Column, key: str) -> tuple[float, float] | None:
    """A number's interval in `intervals`, [low, high]; None where it is missing or no such thing."""
    pairs = column.metrics.get("intervals")
    pair = pairs.get(key) if isinstance(pairs, Mapping) else None
    if (
        not isinstance(pair, Sequence)
        or isinstance(pair, str)
        or len(pair) != 2
        or number(column, key) is None
    ):
        return None
    low, high = pair
    both = all(isinstance(x, float | int) and math.isfinite(x) for x in pair)
    return (float(low), float(high)) if both else None


def metric_rows(columns: Sequence[Column]) -> list[tuple[Metric, list[Cell]]]:
    """The metrics at least one column has, one cell a column. Equal bests are all marked."""
    rows = [(metric, _cells(metric, columns)) for metric in METRICS]
    return [
        (metric, cells) for metric, cells in rows if any(cell.text != MISSING for cell in cells)
    ]


def _cells(metric: Metric, columns: Sequence[Column]) -> list[Cell]:
    values = [number(column, metric.key) for column in columns]
    spans = [interval(column, metric.key) for column in columns]
    texts = [MISSING if value is None else metric.text(value) for value in values]
    best = best_value(values, metric.better)
    won = (
        "" if best is None or len(set(texts) - {MISSING}) < 2 else metric.text(best)
    )  # what reads alike is alike
    leaders = [
        span for text, span in zip(texts, spans, strict=True) if span is not None and text == won
    ]
    return [
        Cell(
            text,
            text == won,
            f"{metric.text(span[0])} to {metric.text(span[1])}" if span else "",
            text != won and span is not None and any(_overlap(span, s) for s in leaders),
        )
        for text, span in zip(texts, spans, strict=True)
    ]


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def best_value(values: Sequence[float | None], better: Literal["lower", "higher"]) -> float | None:
    """The best finite number; None where fewer than two numbers, or only equal ones, leave nothing to win."""
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if len(set(numbers)) < 2:
        return None
    return min(numbers) if better == "lower" else max(numbers)


def protocol(columns: Sequence[Column]) -> str:
    """The protocol of the numbers, in words: its name (or settings), sample count and seed. Empty where unknown."""
    metrics = next((column.metrics for column in columns if column.metrics), {})
    told = metrics.get("protocol", "")
    name = told.get("name", _plain(told)) if isinstance(told, Mapping) else str(told)
    parts = [name, *(f"{key} {metrics[key]}" for key in ("count", "seed") if key in metrics)]
    level = metrics.get("interval_level")
    parts += [f"{100 * level:.3g} % intervals"] if isinstance(level, float) else []
    return ", ".join(part for part in parts if part)


def other_rows(columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """Every other value, nested ones as `outer.inner`, in order of first appearance, with one text a column."""
    flat = [_flat(column.metrics) for column in columns]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [(key, [_plain(one.get(key)) for one in flat]) for key in keys]


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values by their dotted names, without those the summary shows."""
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        if (
            not prefix
            and key in NOT_OTHER
            and not (key == "protocol" and isinstance(value, Mapping))
        ):
            continue
        found |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return found


def _plain(value: Any) -> str:
    if value is None:
        return MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def chart_data(columns: Sequence[Column]) -> dict[str, Any]:
    """What the page's chart draws: the metrics, and each system's [value, low, high] in the metrics' shown scale."""
    shown = [metric for metric, _ in metric_rows(columns)]
    return {
        "time": TIME,
        "metrics": [
            {"key": m.key, "title": m.title, "better": m.better, "unit": m.unit} for m in shown
        ],
        "systems": [
            {"name": c.name, "values": {m.key: _triple(c, m) for m in shown}} for c in columns
        ],
    }


def _triple(column: Column, metric: Metric) -> list[float] | None:
    value = number(column, metric.key)
    if value is None or not math.isfinite(value):
        return None
    return [metric.scale * x for x in (value, *(interval(column, metric.key) or (value, value)))]


def markdown(columns: Sequence[Column], num_prompts: int, details: Mapping[str, str]) -> str:
    """`report.md`: the summary as a table, best in bold, and where it comes from."""
    heads = [_escape(f"{c.name} ({c.note})" if c.note else c.name) for c in columns]
    lines = [
        f"# {' · '.join(_escape(c.name) for c in columns)}",
        "",
        f"{len(columns)} systems, {num_prompts} prompts.",
    ]
    rows = metric_rows(columns)
    if rows:
        told = protocol(columns)
        lines += ["", f"Protocol: {_escape(told)}."] if told else []
        lines += ["", f"| metric | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        lines += [
            f"| {_escape(m.title)} {ARROW[m.better]} | {' | '.join(map(_bold, cells))} |"
            for m, cells in rows
        ]
        lines += [
            "",
            "Bold: best of its row. In brackets: the interval. ≈: its interval overlaps the best's.",
        ]
    lines += ["", "![Every prompt a row, every system a column](grid.png)", ""]
    lines += [f"- {_escape(key)}: {_escape(value)}" for key, value in details.items()]
    return "\n".join(lines).rstrip() + "\n"


ARROW = {"lower": "↓", "higher": "↑"}


def _bold(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else f"≈ {cell.text}" if cell.tied else cell.text
    return f"{text} ({cell.interval})" if cell.interval else text


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: on one line, and no mark of Markdown's or HTML's taken for one."""
    return "".join(
        "\\" + letter if letter in r"\`*_[]<>|#&!" else letter for letter in " ".join(text.split())
    )
