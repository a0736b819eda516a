"""The pictures of a comparison as one sheet for a paper, PNG or PDF: prompts down, systems across."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusion2gan.compare.table import Column
from diffusion2gan.errors import UserError
from diffusion2gan.runtime import files

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GAP = 8  # pixels between the grid's cells
MIN_SIDE = 128  # pixels: smaller pictures are scaled up in the grid
MAX_SIDE = 512  # pixels: larger ones down
MANY_SIDE = 256  # pixels: the same where one sheet does not hold every row
MAX_PIXELS = (
    48_000_000  # of a sheet: rows beyond it are left out of the PNG and begin a new page of the PDF
)
MAX_LETTERS = 500  # of a prompt: more never fit its cell
DPI = 200
INK, FAINT, PAPER, BLANK = "#1c1c1a", "#6b6b66", "#ffffff", "#efefec"


def write_grid(folder: Path, columns: Sequence[Column], prompts: Sequence[str]) -> int:
    """Writes `folder/grid.png` (the first rows) and `folder/grid.pdf` (all, in pages); returns the PNG's rows."""
    side = MAX_SIDE if rows_a_sheet(columns, prompts, MAX_SIDE) == len(prompts) else MANY_SIDE
    rows = rows_a_sheet(columns, prompts, side)
    first = grid(_rows(columns, 0, rows), prompts[:rows], max_side=side)
    files.write_image(folder / "grid.png", first.save)
    starts = range(rows, len(prompts), rows)
    pages = (
        grid(_rows(columns, i, i + rows), prompts[i : i + rows], max_side=side) for i in starts
    )
    files.write_image(folder / "grid.pdf", lambda path: _save_pdf(path, first, pages))
    return rows


def _save_pdf(path: Path, first: Image.Image, pages: Iterable[Image.Image]) -> None:
    first.save(path, save_all=True, append_images=pages, resolution=DPI, quality=92, subsampling=0)


def rows_a_sheet(columns: Sequence[Column], prompts: Sequence[str], max_side: int) -> int:
    """How many rows a sheet of at most MAX_PIXELS holds; one at least."""
    check(columns, prompts)
    layout = measure(columns, max_side=max_side)
    width, height = layout.corner(0, len(columns))
    return min(len(prompts), max(1, (MAX_PIXELS // width - height) // (layout.cell[1] + GAP)))


def _rows(columns: Sequence[Column], start: int, stop: int) -> list[Column]:
    return [Column(c.name, c.images[start:stop], c.metrics, c.note) for c in columns]


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
    columns: Sequence[Column],
    prompts: Sequence[str],
    *,
    min_side: int = MIN_SIDE,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """One prompt a row, one system a column: names above, prompts at the left, RGB.

    All cells are one size, that of the largest picture: scaled up by a whole factor where its shorter side is under
    `min_side` pixels, down where its longer side is over `max_side`. Raises UserError as `check` does.
    """
    check(columns, prompts)
    layout = measure(columns, min_side, max_side)
    sheet = Image.new("RGB", layout.corner(len(prompts), len(columns)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = _font(layout.text)
    for row, prompt in enumerate(prompts):
        text = fit_text(
            prompt[:MAX_LETTERS],
            font,
            layout.label,
            lines=layout.cell[1] // line_height(layout.text),
        )
        _write(draw, (GAP, layout.corner(row, 0)[1]), text, font, INK)
    for index, column in enumerate(columns):
        _head(draw, layout, index, column, font)
        for row, picture in enumerate(column.images):
            _paste(sheet, layout, layout.corner(row, index), picture, font)
    return sheet


def measure(
    columns: Sequence[Column], min_side: int = MIN_SIDE, max_side: int = MAX_SIDE
) -> Layout:
    """The layout `grid` uses for these columns: its cell, text about 1/18 of that, a header that holds every name."""
    sizes = [picture.size for column in columns for picture in column.images if picture is not None]
    width = max((size[0] for size in sizes), default=min_side)
    height = max((size[1] for size in sizes), default=min_side)
    cell = _cell(width, height, min_side, max_side)
    text = max(14, min(cell) // 18)
    lines = max(
        len(name) + len(note) for name, note in (_heading(c, _font(text), cell[0]) for c in columns)
    )
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


def _head(
    draw: ImageDraw.ImageDraw, layout: Layout, index: int, column: Column, font: Font
) -> None:
    """Sets a system's name and note on the upper edge of its pictures."""
    name, note = _heading(column, font, layout.cell[0])
    line = line_height(layout.text)
    x, y = layout.corner(0, index)
    _write(draw, (x, y - GAP // 2 - (len(name) + len(note)) * line), name, font, INK)
    _write(draw, (x, y - GAP // 2 - len(note) * line), note, font, FAINT)


def _paste(
    sheet: Image.Image,
    layout: Layout,
    corner: tuple[int, int],
    picture: Image.Image | None,
    font: Font,
) -> None:
    """Puts a picture into its cell, whole and centred, or a blank that says there is none."""
    if picture is not None:
        resized = ImageOps.contain(picture.convert("RGB"), layout.cell, Image.Resampling.LANCZOS)
        offset = [(cell - side) // 2 for cell, side in zip(layout.cell, resized.size, strict=True)]
        sheet.paste(resized, (corner[0] + offset[0], corner[1] + offset[1]))
        return
    sheet.paste(BLANK, (*corner, corner[0] + layout.cell[0], corner[1] + layout.cell[1]))
    _write(ImageDraw.Draw(sheet), (corner[0] + GAP, corner[1] + GAP), ["no picture"], font, FAINT)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: Font,
    colour: str,
) -> None:
    size = font.size if isinstance(font, ImageFont.FreeTypeFont) else 14
    for number, line in enumerate(lines):
        draw.text(
            (corner[0], corner[1] + number * line_height(round(size))), line, fill=colour, font=font
        )


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
    length = (
        next(
            (n for n in range(1, len(word) + 1) if font.getlength(word[:n]) > width), len(word) + 1
        )
        - 1
    )
    return word[: max(1, length)]
