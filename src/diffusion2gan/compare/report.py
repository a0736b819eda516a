"""The report of a comparison: one page that opens from disk with no network, and the same as PNG, PDF and Markdown."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffusion2gan.compare import table
from diffusion2gan.compare.grid import check, write_grid
from diffusion2gan.compare.table import Column
from diffusion2gan.runtime import files

MAX_LETTERS = 1000  # of a prompt on the page; the JSON behind "Download" holds all
MAX_ALT = 120  # of it in a picture's alternative text


class Embedding(NamedTuple):
    """How a page holds its pictures: their format, and the longest side they are shrunk to."""

    form: str
    max_side: int
    note: str


EXACT = Embedding("PNG", 1 << 16, "")
COMPACT = Embedding("WEBP", 1 << 14, "embedded as WebP, quality 90; PNG up to 24 megapixels in all")
SMALL = Embedding(
    "WEBP",
    512,
    "embedded as WebP, quality 90, shrunk to 512 pixels: more than 400 megapixels in all",
)


def write_report(
    folder: Path, columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]
) -> None:
    """Writes `index.html` (self-contained), `grid.png`, `grid.pdf` and `report.md`, each whole or not at all.

    `details`: lines of provenance for the foot of the page (teacher, seed, guidance…). Raises UserError where there
    is nothing to show or a column has not one picture a prompt; nothing is written then.
    """
    folder = Path(folder)
    page = render(columns, prompts, details)
    rows = write_grid(folder, columns, prompts)
    shown = (
        {"grid.png": f"the first {rows} of {len(prompts)} prompts; grid.pdf has all"}
        if rows < len(prompts)
        else {}
    )
    _write(folder / "report.md", table.markdown(columns, len(prompts), {**details, **shown}))
    _write(folder / "index.html", page)


def _write(path: Path, text: str) -> None:
    with files.atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def render(columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]) -> str:
    """The page's HTML. Every name, prompt and detail is escaped. Raises UserError as `write_report` does."""
    check(columns, prompts)
    environment = Environment(
        loader=PackageLoader("diffusion2gan.compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    embedding = choose_embedding(columns)
    notes = {"pictures": embedding.note} if embedding.note else {}
    return environment.get_template("report.html.j2").render(
        columns=columns,
        metrics=table.metric_rows(columns),
        others=table.other_rows(columns),
        protocol=table.protocol(columns),
        chart=table.chart_data(columns),
        raw=raw(columns, prompts, details),
        prompts=[_row(columns, prompt, row, embedding) for row, prompt in enumerate(prompts)],
        details={**details, **notes},
    )


def raw(
    columns: Sequence[Column], prompts: Sequence[str], details: Mapping[str, str]
) -> dict[str, Any]:
    """What the page's download holds: everything it was made from but the pictures. NaN and ±∞ become null."""
    systems = [
        {"name": c.name, "note": c.note, "metrics": _finite(dict(c.metrics))} for c in columns
    ]
    return {"systems": systems, "prompts": list(prompts), "details": dict(details)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_embedding(columns: Sequence[Column]) -> Embedding:
    """Bit for bit where that stays light (24 megapixels, about 40 MB), smaller where it would not open smoothly."""
    sizes = [picture.size for column in columns for picture in column.images if picture is not None]
    pixels = sum(width * height for width, height in sizes)
    return EXACT if pixels <= 24e6 else COMPACT if pixels <= 400e6 else SMALL


def _row(columns: Sequence[Column], prompt: str, row: int, embedding: Embedding) -> dict[str, Any]:
    """One prompt as the template shows it, with a (column, data URI or None, width, height) a system."""
    shots = [_shot(column, column.images[row], embedding) for column in columns]
    left_out = len(prompt) - MAX_LETTERS
    more = f" … and {left_out} more characters" if left_out > 0 else ""
    return {
        "text": prompt[:MAX_LETTERS],
        "more": more,
        "alt": shorten(prompt, MAX_ALT),
        "shots": shots,
    }


def shorten(text: str, length: int) -> str:
    """`text` in at most `length` characters, the last an ellipsis where some are missing."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _shot(
    column: Column, picture: Image.Image | None, embedding: Embedding
) -> tuple[Column, str | None, int, int]:
    if picture is None:
        return column, None, 0, 0
    return column, data_uri(picture, embedding), *picture.size


def data_uri(picture: Image.Image, embedding: Embedding = EXACT) -> str:
    """A picture in base64, without metadata: at its own size, or shrunk to the embedding's longest side."""
    buffer = io.BytesIO()
    picture = picture.convert("RGB")
    picture.info.clear()
    picture.thumbnail((embedding.max_side, embedding.max_side), Image.Resampling.LANCZOS)
    picture.save(
        buffer,
        embedding.form,
        **({"optimize": True} if embedding.form == "PNG" else {"quality": 90}),
    )
    return f"data:image/{embedding.form.lower()};base64," + base64.b64encode(
        buffer.getvalue()
    ).decode("ascii")
