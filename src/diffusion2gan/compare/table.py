"""The metrics of a comparison: one row per metric, one cell per system, the best marked.

They are laid out as cells for the page and as a Markdown table for `report.md`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from PIL import Image

MISSING = "–"
TIME = "seconds_per_image"
ARROW = {"lower": "↓", "higher": "↑"}


@dataclass(frozen=True)
class Column:
    """One system of a comparison.

    `images`: one image per prompt, None if it is missing; `metrics`: the metrics from `evaluate`,
    possibly empty; `note`: a few words such as "50 steps".
    """

    name: str
    images: Sequence[Image.Image | None]
    metrics: Mapping[str, Any]
    note: str = ""


class Metric(NamedTuple):
    """How a number of metrics.json is shown: `scale` × value in the format `form`, then `unit`."""

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
    Metric("frechet_distance_to_teacher", "Fréchet distance to the teacher", "lower"),
    Metric("kernel_distance_to_teacher", "Kernel distance to the teacher", "lower"),
    Metric("cmmd_to_teacher", "CMMD to the teacher", "lower"),
    Metric("clip_score", "CLIP score", "higher"),
    # Stored as a share in [0, 1]
    Metric("attribute_accuracy", "Attribute accuracy", "higher", ".1f", " %", 100.0),
    Metric("precision", "Precision", "higher", ".3f"),
    Metric("recall", "Recall", "higher", ".3f"),
    Metric("density", "Density", "higher", ".3f"),
    Metric("coverage", "Coverage", "higher", ".3f"),
    Metric("precision_to_teacher", "Precision, to the teacher", "higher", ".3f"),
    Metric("recall_to_teacher", "Recall, to the teacher", "higher", ".3f"),
    Metric("density_to_teacher", "Density, to the teacher", "higher", ".3f"),
    Metric("coverage_to_teacher", "Coverage, to the teacher", "higher", ".3f"),
    Metric("diversity", "Diversity", "higher"),
    Metric("same_noise_distance", "Same-noise distance", "lower"),
    Metric(TIME, "Time per image", "lower", ".3g", " s"),
    Metric("seconds_per_image_p90", "Time per image, 90th percentile", "lower", ".3g", " s"),
    Metric("images_per_second", "Images per second", "higher", ".3g"),
    Metric("peak_memory_bytes", "Peak memory", "lower", ".3g", " GiB", 2.0**-30),
)
TIMES = ("seconds_per_image", "seconds_per_image_p90", "images_per_second")
# Keys shown elsewhere on the page, which the table of other values leaves out
SHOWN_KEYS = {"intervals", "protocol", *(metric.key for metric in METRICS)}


class Cell(NamedTuple):
    """One number of the table.

    `best`: the number is the best of its row; `interval`: its interval as text, empty if there is
    none; `tied`: the number is not the best, but its interval overlaps that of the best.
    """

    text: str
    best: bool = False
    interval: str = ""
    tied: bool = False


# ---------------------------------------------------------------------- Reading a system's metrics


def get_number(column: Column, key: str) -> float | None:
    """A number of a column, or None if it has none.

    A same-noise distance of 0 is left out: it is the teacher's distance to itself.
    """
    value = column.metrics.get(key)
    if isinstance(value, bool) or not isinstance(value, float | int):
        return None
    if key == "same_noise_distance" and value == 0:
        return None
    return float(value)


def get_interval(column: Column, key: str) -> tuple[float, float] | None:
    """The interval [low, high] of a number, or None if it is missing or malformed."""
    intervals = column.metrics.get("intervals")
    if not isinstance(intervals, Mapping) or get_number(column, key) is None:
        return None

    interval = intervals.get(key)
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        return None
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in interval):
        return None
    low, high = interval
    return float(low), float(high)


# ---------------------------------------------------------------------------- The table of metrics


def metric_rows(columns: Sequence[Column]) -> list[tuple[Metric, list[Cell]]]:
    """The metrics that at least one column has, with one cell per column.

    If several columns share the best value, all of them are marked.
    """
    rows = []
    for metric in METRICS:
        cells = _build_cells(metric, columns)
        if any(cell.text != MISSING for cell in cells):
            rows.append((metric, cells))
    return rows


def _build_cells(metric: Metric, columns: Sequence[Column]) -> list[Cell]:
    values = [get_number(column, metric.key) for column in columns]
    intervals = [get_interval(column, metric.key) for column in columns]
    texts = [MISSING if value is None else metric.text(value) for value in values]

    # The best as it is printed: values that are printed alike count as equal
    best_text = None
    best = best_value(values, metric.better)
    if best is not None and len(set(texts) - {MISSING}) > 1:
        best_text = metric.text(best)
    best_intervals = []
    for text, interval in zip(texts, intervals, strict=True):
        if text == best_text and interval is not None:
            best_intervals.append(interval)

    # One cell per column
    cells = []
    for text, interval in zip(texts, intervals, strict=True):
        is_best = text == best_text
        if interval is None:
            cells.append(Cell(text, is_best))
            continue
        low, high = interval
        overlaps = False
        for best_low, best_high in best_intervals:
            if low <= best_high and best_low <= high:
                overlaps = True
        interval_text = f"{metric.text(low)} to {metric.text(high)}"
        cells.append(Cell(text, is_best, interval_text, tied=overlaps and not is_best))
    return cells


def best_value(values: Sequence[float | None], better: Literal["lower", "higher"]) -> float | None:
    """The best finite value, or None if there are fewer than two different ones."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(set(finite)) < 2:
        return None
    if better == "lower":
        return min(finite)
    return max(finite)


def describe_protocol(columns: Sequence[Column]) -> str:
    """The protocol of the metrics: its name, sample count, seed and interval level.

    Empty if it is unknown. The first column with metrics is read: all columns have the same
    protocol, which `evaluate.protocols.check_same_protocol` has checked.
    """
    metrics = next((column.metrics for column in columns if column.metrics), {})

    # A name, or settings that usually contain one
    protocol = metrics.get("protocol", "")
    if isinstance(protocol, Mapping):
        protocol = protocol.get("name", _plain_text(protocol))
    phrases = [str(protocol)]

    for key in ("count", "seed"):
        if key in metrics:
            phrases.append(f"{key} {metrics[key]}")
    level = metrics.get("interval_level")
    if isinstance(level, float):
        phrases.append(f"{100 * level:.3g} % intervals")
    return ", ".join(phrase for phrase in phrases if phrase)


# --------------------------------------------------------------------------- The other values


def other_rows(columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """All other values, with one text per column, in order of first appearance.

    Nested values have dotted keys, `outer.inner`.
    """
    flattened = [_flatten_others(column.metrics) for column in columns]
    keys = dict.fromkeys(key for values in flattened for key in values)

    rows = []
    for key in keys:
        rows.append((key, [_plain_text(values.get(key)) for values in flattened]))
    return rows


def _flatten_others(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The values by dotted key, without those that the page shows elsewhere.

    A protocol that consists of settings is kept: elsewhere only its name is shown.
    """
    others = {}
    for key, value in metrics.items():
        is_settings = key == "protocol" and isinstance(value, Mapping)
        if key not in SHOWN_KEYS or is_settings:
            others[key] = value
    return _flatten(others)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain_text(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


# ------------------------------------------------------------------------------------- The charts


def chart_data(columns: Sequence[Column]) -> dict[str, Any]:
    """The data of the page's charts: the metrics, and [value, low, high] of each system per metric.

    The numbers are multiplied by the metric's scale.
    """
    metrics = [metric for metric, _ in metric_rows(columns)]
    shown_metrics = [
        {"key": metric.key, "title": metric.title, "better": metric.better, "unit": metric.unit}
        for metric in metrics
    ]
    systems = []
    for column in columns:
        values = {metric.key: _chart_point(column, metric) for metric in metrics}
        systems.append({"name": column.name, "values": values})
    return {"time": TIME, "metrics": shown_metrics, "systems": systems}


def _chart_point(column: Column, metric: Metric) -> list[float] | None:
    """[value, low, high], or None if there is no finite value."""
    value = get_number(column, metric.key)
    if value is None or not math.isfinite(value):
        return None
    low, high = get_interval(column, metric.key) or (value, value)
    return [metric.scale * value, metric.scale * low, metric.scale * high]


# --------------------------------------------------------------------------------------- Markdown


def markdown(
    columns: Sequence[Column],
    num_prompts: int,
    details: Mapping[str, str],
    headlines: Sequence[str] = (),
) -> str:
    """A title, the headlines, the table of metrics with the best in bold, and its provenance."""
    # Title
    names = [_escape(column.name) for column in columns]
    lines = [
        f"# {' · '.join(names)}",
        "",
        f"{plural(len(columns), 'system')}, {plural(num_prompts, 'prompt')}.",
    ]
    for line in headlines:
        lines += ["", _escape(line)]

    # Table of metrics
    rows = metric_rows(columns)
    if rows:
        protocol = describe_protocol(columns)
        if protocol:
            lines += ["", f"Protocol: {_escape(protocol)}."]
        headings = []
        for column in columns:
            note = f" ({column.note})" if column.note else ""
            headings.append(_escape(column.name + note))
        lines += ["", f"| metric | {' | '.join(headings)} |", "|---" * (len(columns) + 1) + "|"]
        for metric, cells in rows:
            texts = [_markdown_cell(cell) for cell in cells]
            lines.append(
                f"| {_escape(metric.title)} {ARROW[metric.better]} | {' | '.join(texts)} |"
            )
        lines += [
            "",
            "Bold: the best of its row. ≈: its interval overlaps that of the best. "
            "Intervals are in parentheses.",
        ]

    # Images and provenance
    lines += ["", "![One row per prompt, one column per system](grid.png)", ""]
    for key, value in details.items():
        lines.append(f"- {_escape(key)}: {_escape(value)}")
    return "\n".join(lines).rstrip() + "\n"


def plural(count: int, noun: str) -> str:
    """`1 system`, `2 systems`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _markdown_cell(cell: Cell) -> str:
    text = cell.text
    if cell.best:
        text = f"**{text}**"
    elif cell.tied:
        text = f"≈ {text}"
    if cell.interval:
        text += f" ({cell.interval})"
    return text


def _escape(text: str) -> str:
    """Puts `text` on one line and escapes characters that Markdown or HTML would interpret."""
    one_line = " ".join(text.split())
    return re.sub(r"[\\`*_\[\]<>|#&!]", r"\\\g<0>", one_line)
