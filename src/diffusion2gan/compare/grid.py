"""The images of a comparison on one sheet for a paper, as PNG and PDF.

One row per prompt, one column per system.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusion2gan.compare.table import Column
from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import write_image

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# All sizes are in pixels
GAP = 8  # between cells
MIN_SIDE = 128  # smaller images are enlarged
MAX_SIDE = 512  # larger images are reduced
MANY_ROWS_SIDE = 256  # used instead of MAX_SIDE if the rows do not fit on one sheet
# The size of a sheet. Further rows are left out of the PNG and start a new page of the PDF.
MAX_PIXELS = 48_000_000

MAX_PROMPT_LENGTH = 500  # characters; longer prompts never fit into a cell
DPI = 200
INK, FAINT, PAPER, BLANK = "#1c1c1a", "#6b6b66", "#ffffff", "#efefec"


# ------------------------------------------------------------------------------------------- Files


def write_grid(folder: Path, columns: Sequence[Column], prompts: Sequence[str]) -> int:
    """Writes `folder/grid.png` (the first rows) and `folder/grid.pdf` (all rows, on several pages).

    Returns the number of rows in the PNG.
    """
    # Large cells if all rows fit on one sheet, otherwise smaller ones
    max_side = MAX_SIDE
    if rows_per_sheet(columns, prompts, max_side) < len(prompts):
        max_side = MANY_ROWS_SIDE
    rows = rows_per_sheet(columns, prompts, max_side)

    def draw_page(start: int) -> Image.Image:
        stop = start + rows
        page_columns = [
            Column(column.name, column.images[start:stop], column.metrics, column.note)
            for column in columns
        ]
        return draw_grid(page_columns, prompts[start:stop], max_side=max_side)

    # PNG
    first_page = draw_page(0)
    write_image(folder / "grid.png", first_page.save)

    # PDF: each further page is drawn when it is written, so that only one is in memory at a time
    def further_pages() -> Iterator[Image.Image]:
        for start in range(rows, len(prompts), rows):
            yield draw_page(start)

    def save_pdf(path: Path) -> None:
        first_page.save(
            path,
            save_all=True,
            append_images=further_pages(),
            resolution=DPI,
            quality=92,
            subsampling=0,
        )

    write_image(folder / "grid.pdf", save_pdf)
    return rows


def rows_per_sheet(columns: Sequence[Column], prompts: Sequence[str], max_side: int) -> int:
    """How many rows fit on a sheet of at most MAX_PIXELS; at least one."""
    check_columns(columns, prompts)
    layout = compute_layout(columns, max_side=max_side)
    width, height_without_rows = layout.corner(0, len(columns))
    row_height = layout.cell[1] + GAP
    rows = (MAX_PIXELS // width - height_without_rows) // row_height
    return min(len(prompts), max(1, rows))


def check_columns(columns: Sequence[Column], prompts: Sequence[str]) -> None:
    """Checks that there is something to show, and that columns have one image (or None) per prompt.

    Raises UserError otherwise.
    """
    if not columns or not prompts:
        raise UserError(
            f"nothing to compare: there are {len(columns)} systems and {len(prompts)} prompts. "
            "Give at least one of each."
        )

    for column in columns:
        if len(column.images) != len(prompts):
            raise UserError(
                f"column {column.name!r} has {len(column.images)} images for {len(prompts)} "
                "prompts. Give one image per prompt, in the order of the prompts, and None for an "
                "image that is missing."
            )


# ------------------------------------------------------------------------------------------ Layout


class Layout(NamedTuple):
    """The sizes in a grid, in pixels."""

    cell: tuple[int, int]  # width and height of every image
    text: int  # font size
    label: int  # width of the column of prompts
    header: int  # height of the row of names

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The upper left corner of an image; one past the last image, the size of the grid."""
        x = 2 * GAP + self.label + column * (self.cell[0] + GAP)
        y = 2 * GAP + self.header + row * (self.cell[1] + GAP)
        return x, y


def compute_layout(
    columns: Sequence[Column], min_side: int = MIN_SIDE, max_side: int = MAX_SIDE
) -> Layout:
    """The layout of a grid: text of about 1/18 of a cell, and a header that fits every name."""
    # Every cell has the size of the largest image
    widths = []
    heights = []
    for column in columns:
        for image in column.images:
            if image is not None:
                widths.append(image.width)
                heights.append(image.height)
    width = max(widths, default=min_side)
    height = max(heights, default=min_side)
    cell = _scale_cell(width, height, min_side, max_side)

    # Text, and the lines of the longest heading
    text = max(14, min(cell) // 18)
    header_lines = 0
    for column in columns:
        name, note = _heading_lines(column, _load_font(text), cell[0])
        header_lines = max(header_lines, len(name) + len(note))
    return Layout(cell, text, label=14 * text, header=header_lines * line_height(text))


def _scale_cell(width: int, height: int, min_side: int, max_side: int) -> tuple[int, int]:
    """Scales up by an integer until the shorter side is `min_side`, or down to `max_side`."""
    scale: float = max(1, math.ceil(min_side / min(width, height)))
    if scale == 1:
        scale = min(1.0, max_side / max(width, height))
    return round(width * scale), round(height * scale)


def line_height(text: int) -> int:
    """The distance between lines of text, for a font size of `text` pixels."""
    return round(1.3 * text)


# ----------------------------------------------------------------------------------------- Drawing


def draw_grid(
    columns: Sequence[Column],
    prompts: Sequence[str],
    *,
    min_side: int = MIN_SIDE,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """Draws one row per prompt and one column per system, with names above and prompts at the left.

    All cells have the size of the largest image. It is scaled up by an integer factor if its
    shorter side is less than `min_side` pixels, or down if its longer side is more than `max_side`.
    Returns an RGB image. Raises UserError as `check_columns` does.
    """
    check_columns(columns, prompts)
    layout = compute_layout(columns, min_side, max_side)
    font = _load_font(layout.text)
    sheet = Image.new("RGB", layout.corner(len(prompts), len(columns)), PAPER)
    draw = ImageDraw.Draw(sheet)

    # Prompts
    num_lines = layout.cell[1] // line_height(layout.text)
    for row, prompt in enumerate(prompts):
        lines = fit_text(prompt[:MAX_PROMPT_LENGTH], font, layout.label, num_lines)
        _, y = layout.corner(row, 0)
        _draw_lines(draw, (GAP, y), lines, font, INK)

    # Systems: the heading, then the images
    for index, column in enumerate(columns):
        _draw_heading(draw, layout, index, column, font)
        for row, image in enumerate(column.images):
            corner = layout.corner(row, index)
            if image is None:
                _draw_blank(sheet, layout, corner, font)
            else:
                _paste_image(sheet, layout, corner, image)
    return sheet


def _draw_heading(
    draw: ImageDraw.ImageDraw, layout: Layout, index: int, column: Column, font: Font
) -> None:
    """Writes the name and note of a system just above its first image."""
    name, note = _heading_lines(column, font, layout.cell[0])
    line = line_height(layout.text)
    x, y = layout.corner(0, index)

    # The note ends just above the image, the name just above the note
    bottom = y - GAP // 2
    note_top = bottom - len(note) * line
    name_top = note_top - len(name) * line
    _draw_lines(draw, (x, name_top), name, font, INK)
    _draw_lines(draw, (x, note_top), note, font, FAINT)


def _heading_lines(column: Column, font: Font, width: int) -> tuple[list[str], list[str]]:
    """The name of a system, on at most three lines, and its note, on at most two."""
    name = fit_text(column.name, font, width, max_lines=3)
    note = fit_text(column.note, font, width, max_lines=2)
    return name, note


def _paste_image(
    sheet: Image.Image, layout: Layout, corner: tuple[int, int], image: Image.Image
) -> None:
    """Resizes an image to fit its cell, without cropping, and centres it there."""
    resized = ImageOps.contain(image.convert("RGB"), layout.cell, Image.Resampling.LANCZOS)
    x = corner[0] + (layout.cell[0] - resized.width) // 2
    y = corner[1] + (layout.cell[1] - resized.height) // 2
    sheet.paste(resized, (x, y))


def _draw_blank(sheet: Image.Image, layout: Layout, corner: tuple[int, int], font: Font) -> None:
    """Fills the cell of a missing image."""
    x, y = corner
    sheet.paste(BLANK, (x, y, x + layout.cell[0], y + layout.cell[1]))
    _draw_lines(ImageDraw.Draw(sheet), (x + GAP, y + GAP), ["no image"], font, FAINT)


# -------------------------------------------------------------------------------------------- Text


def _load_font(text: int) -> Font:
    """Pillow's built-in font, which is the same on every machine. It has only Latin letters."""
    return ImageFont.load_default(text)


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: Font,
    colour: str,
) -> None:
    text = round(font.size) if isinstance(font, ImageFont.FreeTypeFont) else 14
    x, y = corner
    for number, line in enumerate(lines):
        draw.text((x, y + number * line_height(text)), line, fill=colour, font=font)


def fit_text(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Breaks `text` into at most `max_lines` lines of at most `width` pixels.

    If it is longer, the last line ends with an ellipsis.
    """
    lines = _wrap(text, font, width)
    if len(lines) <= max_lines:
        return lines

    # Shorten the last line until the ellipsis fits
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip(" ,.;") + "…"]


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Breaks `text` into lines of at most `width` pixels.

    Lines are broken at spaces, and inside a word only if it is wider than a line.
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        # The word still fits on the line
        extended = f"{line} {word}" if line else word
        if font.getlength(extended) <= width:
            line = extended
            continue

        # It starts a new line, or fills several
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            prefix = _longest_prefix(word, font, width)
            lines.append(prefix)
            word = word[len(prefix) :]
        line = word

    if line:
        lines.append(line)
    return lines


def _longest_prefix(word: str, font: Font, width: int) -> str:
    """The longest prefix of `word` that fits into `width` pixels, at least one character."""
    for length in range(1, len(word) + 1):
        if font.getlength(word[:length]) > width:
            return word[: max(1, length - 1)]
    return word
