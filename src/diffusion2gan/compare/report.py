"""The report of a comparison: a page that opens from disk offline, and PNG, PDF, Markdown."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffusion2gan.compare import headline, table
from diffusion2gan.compare.grid import check_columns, write_grid
from diffusion2gan.compare.table import Column
from diffusion2gan.compare.text import shorten
from diffusion2gan.runtime.files import atomic_write

MAX_PROMPT_LENGTH = 1000  # characters of a prompt on the page; its JSON download has all of them
MAX_ALT_LENGTH = 120  # characters of a prompt in an image's alternative text


class Embedding(NamedTuple):
    """How a page embeds its images: file format, longest side in pixels, note for the reader."""

    form: str
    max_side: int
    note: str


# Pixel for pixel: up to 24 megapixels in total, about 40 MB
EXACT = Embedding("PNG", 1 << 16, "")
COMPACT = Embedding(
    "WEBP",
    1 << 14,
    "embedded as WebP, quality 90, because they have more than 24 megapixels in total",
)
SMALL = Embedding(
    "WEBP",
    512,
    "embedded as WebP, quality 90, and reduced to 512 pixels, because they have more than "
    "400 megapixels in total",
)


def write_report(
    folder: Path, columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]
) -> None:
    """Writes `index.html` (self-contained), `grid.png`, `grid.pdf` and `report.md`.

    Each file is written atomically.

    `details`: lines for the foot of the page about the origin of the images (seed, guidance, …).
    Raises UserError, before anything is written, if there is nothing to show or a column does not
    have one image per prompt.
    """
    folder = Path(folder)
    page = render(columns, prompts, details)

    # The sheet of images, which may be too small for all of the rows
    rows = write_grid(folder, columns, prompts)
    notes = dict(details)
    if rows < len(prompts):
        notes["grid.png"] = f"the first {rows} of {len(prompts)} prompts; grid.pdf has all of them"

    # Markdown and HTML
    _write_text(folder / "report.md", markdown(columns, len(prompts), notes))
    _write_text(folder / "index.html", page)


def markdown(columns: Sequence[Column], num_prompts: int, details: Mapping[str, str]) -> str:
    """The text of `report.md`: the headlines, the table of metrics, the origin of the images."""
    lines = []
    for item in headline.compute_headlines(columns):
        lines.append(f"{item.system.name}: {item.title}. {item.details}.")
    if lines and (note := headline.load_note(columns)):
        lines.append(note)
    notes = dict(details)
    for number, machine in enumerate(headline.describe_machines(columns)):
        notes["times" if number == 0 else f"times {number + 1}"] = machine
    return table.markdown(columns, num_prompts, notes, lines)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


# ---------------------------------------------------------------------------------------- The page


def render(columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]) -> str:
    """The HTML of the page. Every name, prompt and detail is escaped.

    Raises UserError as `write_report` does.
    """
    check_columns(columns, prompts)

    # Limit the page's size: with more pixels in total, images are compressed more
    embedding = choose_embedding(columns)
    notes = dict(details)
    if embedding.note:
        notes["images"] = embedding.note

    # Fill in the template
    environment = Environment(
        loader=PackageLoader("diffusion2gan.compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        columns=columns,
        headlines=headline.compute_headlines(columns),
        machines=headline.describe_machines(columns),
        load_note=headline.load_note(columns),
        loads=[headline.describe_load(column) for column in columns],
        times=table.TIMES,
        metrics=table.metric_rows(columns),
        others=table.other_rows(columns),
        protocol=table.describe_protocol(columns),
        chart=table.chart_data(columns),
        download=download_data(columns, prompts, details),
        prompts=[
            _template_row(columns, prompt, row, embedding) for row, prompt in enumerate(prompts)
        ],
        details=notes,
    )


def download_data(
    columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON that the page offers for download: everything but the images."""
    systems = []
    for column in columns:
        metrics = _replace_non_finite(dict(column.metrics))
        systems.append({"name": column.name, "note": column.note, "metrics": metrics})
    return {"systems": systems, "prompts": list(prompts), "details": dict(details)}


def _replace_non_finite(value: Any) -> Any:
    """Replaces NaN and ±∞, which JSON does not have, with None, in nested values as well."""
    if isinstance(value, Mapping):
        return {str(key): _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _template_row(
    columns: Sequence[Column], prompt: str, row: int, embedding: Embedding
) -> dict[str, Any]:
    """A prompt and its images, as the template expects them.

    An image is a tuple (column, data URI, width, height); the URI of a missing image is None.
    """
    num_hidden = len(prompt) - MAX_PROMPT_LENGTH
    more = f" … and {num_hidden} more characters" if num_hidden > 0 else ""

    shots: list[tuple[Column, str | None, int, int]] = []
    for column in columns:
        image = column.images[row]
        if image is None:
            shots.append((column, None, 0, 0))
        else:
            shots.append((column, data_uri(image, embedding), image.width, image.height))
    return {
        "text": prompt[:MAX_PROMPT_LENGTH],
        "more": more,
        "alt": shorten(prompt, MAX_ALT_LENGTH),
        "shots": shots,
    }


# ---------------------------------------------------------------------------------- Embedded images


def choose_embedding(columns: Sequence[Column]) -> Embedding:
    """Exact images if the page is then small enough to open quickly, compressed ones otherwise."""
    num_pixels = 0
    for column in columns:
        for image in column.images:
            if image is not None:
                num_pixels += image.width * image.height
    if num_pixels <= 24e6:
        return EXACT
    if num_pixels <= 400e6:
        return COMPACT
    return SMALL


def data_uri(image: Image.Image, embedding: Embedding = EXACT) -> str:
    """An image as a data URI without metadata, its longest side at most that of the embedding."""
    # A copy without metadata, reduced if it is too large
    image = image.convert("RGB")
    image.info.clear()
    image.thumbnail((embedding.max_side, embedding.max_side), Image.Resampling.LANCZOS)

    # Encode it
    buffer = io.BytesIO()
    if embedding.form == "PNG":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, embedding.form, quality=90)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{embedding.form.lower()};base64,{encoded}"
