"""The report of a comparison: one page that opens from disk with no network, and the same pictures as one PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusion2gan.errors import UserError
from diffusion2gan.runtime import files

Number = float | int | str
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MISSING = "–"
GAP = 8  # pixels between the grid's cells
MIN_SIDE = 128  # pixels: smaller pictures are scaled up in the grid
MAX_SIDE = 512  # pixels: larger ones down
INK, FAINT, PAPER, BLANK = "#1c1c1a", "#6b6b66", "#ffffff", "#efefec"


@dataclass(frozen=True)
class Column:
    """One system of a comparison.

    `images`: one PIL picture a prompt (None where missing); `metrics`: evaluate's keys → numbers, may be empty;
    `note`: a few words such as '50 steps'.
    """

    name: str
    images: Sequence[Image.Image | None]
    metrics: Mapping[str, Number]
    note: str = ""


class Metric(NamedTuple):
    """How a number of evaluate's is shown: `scale` × value in `form`, with its `unit`."""

    key: str
    title: str
    better: Literal["lower", "higher"]
    form: str = ".4g"
    unit: str = ""
    scale: float = 1.0


METRICS = (
    Metric("frechet_distance", "Fréchet distance", "lower"),
    Metric("frechet_distance_clip", "Fréchet distance, CLIP", "lower"),
    Metric("clip_score", "CLIP score", "higher"),
    Metric("attribute_accuracy", "Attribute accuracy", "higher", ".1f", " %", 100.0),  # stored as a share in [0, 1]
    Metric("same_noise_distance", "Same-noise distance", "lower"),
    Metric("seconds_per_image", "Time per image", "lower", ".3g", " s"),
    Metric("images_per_second", "Images per second", "higher", ".3g"),
)


class Cell(NamedTuple):
    """One number of the metrics table: its text, and whether it is the best of its row."""

    text: str
    best: bool


def write_report(
    folder: Path, columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]
) -> None:  # fmt: skip
    """Writes `folder/index.html` (self-contained, pictures embedded) and `folder/grid.png`, each whole or not at all.

    `details`: lines of provenance for the foot of the page (teacher, seed, guidance…). Raises UserError where there
    is nothing to show or a column has not one picture a prompt; nothing is written then.
    """
    page, picture = render(columns, prompts, details), grid(columns, prompts)
    files.write_image(Path(folder) / "grid.png", picture.save)
    with files.whole(Path(folder) / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- the page


def render(columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]) -> str:
    """The page's HTML. Every name, prompt and detail is escaped. Raises UserError as `write_report` does."""
    check(columns, prompts)
    loader = PackageLoader("diffusion2gan.compare")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        columns=columns,
        metrics=metric_rows(columns),
        others=other_rows(columns),
        prompts=[(prompt, _shots(columns, row)) for row, prompt in enumerate(prompts)],
        details=details,
        missing=MISSING,
    )


def check(columns: Sequence[Column], prompts: Sequence[str]) -> None:
    """Raises UserError unless there is something to show and every column has one picture (or None) a prompt."""
    if not columns or not prompts:
        raise UserError(
            f"nothing to compare: {len(columns)} systems and {len(prompts)} prompts. Give at least one of each."
        )
    for column in columns:
        if len(column.images) != len(prompts):
            raise UserError(
                f"column {column.name!r} has {len(column.images)} pictures for {len(prompts)} prompts. Give one "
                "picture a prompt, in the prompts' order, and None where one is missing."
            )


def metric_rows(columns: Sequence[Column]) -> list[tuple[Metric, list[Cell]]]:
    """The metrics at least one column has, one cell a column. Equal bests are all marked."""
    return [(metric, _cells(metric, columns)) for metric in METRICS if any(metric.key in c.metrics for c in columns)]


def _cells(metric: Metric, columns: Sequence[Column]) -> list[Cell]:
    values = [column.metrics.get(metric.key) for column in columns]
    best = best_value(values, metric.better)
    return [Cell(_text(metric, value), best is not None and value == best) for value in values]


def best_value(values: Sequence[Number | None], better: Literal["lower", "higher"]) -> float | None:
    """The best finite number; None where fewer than two numbers, or only equal ones, leave nothing to win."""
    numbers = [float(v) for v in values if isinstance(v, float | int) and math.isfinite(v)]
    if len(set(numbers)) < 2:
        return None
    return min(numbers) if better == "lower" else max(numbers)


def _text(metric: Metric, value: Number | None) -> str:
    if value is None or isinstance(value, str):
        return value or MISSING
    return f"{metric.scale * value:{metric.form}}{metric.unit}"


def other_rows(columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """Every other key (sample counts, hashes…), in order of first appearance, with one text a column."""
    keys = dict.fromkeys(key for column in columns for key in column.metrics)
    shown = {metric.key for metric in METRICS}
    return [(key, [_plain(column.metrics.get(key)) for column in columns]) for key in keys if key not in shown]


def _plain(value: Number | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shots(columns: Sequence[Column], row: int) -> list[tuple[Column, str | None]]:
    """(column, data URI or None) for one prompt."""
    pictures = [(column, column.images[row]) for column in columns]
    return [(column, None if picture is None else data_uri(picture)) for column, picture in pictures]


def data_uri(picture: Image.Image) -> str:
    """A picture as a base64 PNG, at its own size, without metadata."""
    buffer = io.BytesIO()
    picture = picture.convert("RGB")
    picture.info.clear()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ---------------------------------------------------------------------------------------------------------- the grid


class Layout(NamedTuple):
    """The grid's measures, in pixels."""

    cell: tuple[int, int]  # width, height of every picture
    text: int  # the font's size
    label: int  # width of the prompts' column
    header: int  # height of the names' row

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The left upper corner of a picture; one past the last is the grid's own size."""
        x = 2 * GAP + self.label + column * (self.cell[0] + GAP)
        return x, 2 * GAP + self.header + row * (self.cell[1] + GAP)


def grid(
    columns: Sequence[Column], prompts: Sequence[str], *, min_side: int = MIN_SIDE, max_side: int = MAX_SIDE
) -> Image.Image:  # fmt: skip
    """One prompt a row, one system a column: names above, prompts at the left, RGB.

    All cells are one size, that of the largest picture: scaled up by a whole factor where its shorter side is under
    `min_side` pixels, down where its longer side is over `max_side`. Raises UserError as `write_report` does.
    """
    check(columns, prompts)
    layout = measure(columns, min_side, max_side)
    sheet = Image.new("RGB", layout.corner(len(prompts), len(columns)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = _font(layout.text)
    for row, prompt in enumerate(prompts):
        text = fit_text(prompt, font, layout.label, lines=layout.cell[1] // line_height(layout.text))
        _write(draw, (GAP, layout.corner(row, 0)[1]), text, font, INK)
    for index, column in enumerate(columns):
        _head(draw, layout, index, column, font)
        for row, picture in enumerate(column.images):
            _paste(sheet, layout, layout.corner(row, index), picture, font)
    return sheet


def measure(columns: Sequence[Column], min_side: int = MIN_SIDE, max_side: int = MAX_SIDE) -> Layout:
    """The layout `grid` uses for these columns: its cell, text about 1/18 of that, a header that holds every name."""
    sizes = [picture.size for column in columns for picture in column.images if picture is not None]
    width = max((size[0] for size in sizes), default=min_side)
    height = max((size[1] for size in sizes), default=min_side)
    cell = _cell(width, height, min_side, max_side)
    text = max(14, min(cell) // 18)
    lines = max(len(name) + len(note) for name, note in (_heading(c, _font(text), cell[0]) for c in columns))
    return Layout(cell, text, label=14 * text, header=lines * line_height(text))


def _cell(width: int, height: int, min_side: int, max_side: int) -> tuple[int, int]:
    """width × height, up by the least whole factor that brings the shorter to `min_side`, or down to `max_side`."""
    scale = max(1.0, math.ceil(min_side / min(width, height)))
    if scale == 1:
        scale = min(1.0, max_side / max(width, height))
    return round(width * scale), round(height * scale)


def _font(text: int) -> Font:
    """Pillow's own font, the same on every machine; it has Latin letters alone."""
    return ImageFont.load_default(text)


def line_height(text: int) -> int:
    """Pixels from one line to the next of a font of `text` pixels."""
    return round(1.3 * text)


def _heading(column: Column, font: Font, width: int) -> tuple[list[str], list[str]]:
    """A system's name (three lines at most) and note (two)."""
    return fit_text(column.name, font, width, lines=3), fit_text(column.note, font, width, lines=2)


def _head(draw: ImageDraw.ImageDraw, layout: Layout, index: int, column: Column, font: Font) -> None:
    """Sets a system's name and note on the upper edge of its pictures."""
    name, note = _heading(column, font, layout.cell[0])
    line = line_height(layout.text)
    x, y = layout.corner(0, index)
    _write(draw, (x, y - GAP // 2 - (len(name) + len(note)) * line), name, font, INK)
    _write(draw, (x, y - GAP // 2 - len(note) * line), note, font, FAINT)


def _paste(
    sheet: Image.Image, layout: Layout, corner: tuple[int, int], picture: Image.Image | None, font: Font
) -> None:  # fmt: skip
    """Puts a picture into its cell, whole and centred, or a blank that says there is none."""
    if picture is not None:
        resized = ImageOps.contain(picture.convert("RGB"), layout.cell, Image.Resampling.LANCZOS)
        offset = [(cell - side) // 2 for cell, side in zip(layout.cell, resized.size, strict=True)]
        sheet.paste(resized, (corner[0] + offset[0], corner[1] + offset[1]))
        return
    sheet.paste(BLANK, (*corner, corner[0] + layout.cell[0], corner[1] + layout.cell[1]))
    _write(ImageDraw.Draw(sheet), (corner[0] + GAP, corner[1] + GAP), ["no picture"], font, FAINT)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: Font, colour: str) -> None:
    size = font.size if isinstance(font, ImageFont.FreeTypeFont) else 14
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line_height(round(size))), line, fill=colour, font=font)


def fit_text(text: str, font: Font, width: int, lines: int) -> list[str]:
    """`text` broken into at most `lines` lines of at most `width` pixels; cut with an ellipsis where it is longer."""
    broken = _wrap(text, font, width)
    if len(broken) <= lines:
        return broken
    last = broken[lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*broken[: lines - 1], last.rstrip(" ,.;") + "…"]


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, and inside a word only where it is wider than a line."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        lines += [line] if line else []
        while font.getlength(word) > width and len(word) > 1:
            part = _prefix(word, font, width)
            lines.append(part)
            word = word[len(part) :]
        line = word
    return [*lines, line] if line else lines


def _prefix(word: str, font: Font, width: int) -> str:
    """The longest start of `word` that fits `width` pixels, at least one letter."""
    length = next((n for n in range(1, len(word) + 1) if font.getlength(word[:n]) > width), len(word) + 1) - 1
    return word[: max(1, length)]
