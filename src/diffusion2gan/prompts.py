"""Prompts from files of several formats, and the digest that identifies a list of them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.runtime.files import check_downloaded

MAX_LISTED = 5  # line numbers, or columns, in a message

# Columns that contain prompts, by the names they usually have; the first that exists is read.
PROMPT_COLUMNS = ("prompt", "caption", "text", "prompts", "captions")

STARTER = "starter"  # the name of the prompts in the package
STARTER_FILE = Path(__file__).parent / "starter_prompts.txt"


def split_lines(text: str) -> list[str]:
    """The lines of a text, which end with \\n, \\r\\n or \\r alone.

    `str.splitlines` also splits at characters that belong to a line, such as U+2028 and U+0085.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_lines(path: Path, what: str, remedy: str) -> list[str]:
    """The lines of a text file, one `what` ("prompt", "caption") per line, stripped.

    A byte order mark at its start is ignored. `remedy` ends the message if there is no such file.
    Raises UserError if the file is missing, empty, not UTF-8 or has blank lines.
    """
    path = path.expanduser()
    check_downloaded(path)
    try:
        lines = split_lines(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no {what}s file {path}; {remedy}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a text file with one {what} per line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None

    # Check that every line has text
    lines = [line.strip() for line in lines]
    if not any(lines):
        raise UserError(f"{path} is empty; write one {what} per line")
    blank = [number for number, line in enumerate(lines, 1) if not line]
    if blank:
        listed = ", ".join(map(str, blank[:MAX_LISTED]))
        raise UserError(
            f"{path} has {len(blank)} blank lines (line {listed}); delete them, or write the "
            f"missing {what}s there"
        )
    return lines


@dataclass(frozen=True)
class PromptFile:
    """Prompts, and one line that reports where they are from and how many there are."""

    prompts: list[str]
    report: str


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, as `load_prompts` reads them."""
    return load_prompts(path).prompts


def load_prompts(path: Path, column: str | None = None) -> PromptFile:
    """The prompts of a file or folder, in its order.

    By the name's end: `.jsonl`; `.json` (COCO's caption annotations, or a list); `.csv`, `.tsv`;
    `.parquet`; a folder that `Dataset.save_to_disk` wrote, or one of Parquet files. Any other file
    is text with one prompt per line. `starter` is the list in the package.

    Of a table, `column` is read, by default the first of PROMPT_COLUMNS. Rows without text are left
    out; duplicates are kept; both are reported. Raises UserError if the file cannot be read or has
    no prompts, or its column is missing, not text or not clear.
    """
    # A list of lines
    path = path.expanduser()
    suffix = path.suffix.lower()
    is_text = not path.is_dir() and suffix not in READERS
    if str(path) == STARTER or is_text:
        if column is not None:
            raise UserError(f"--prompt-column {column}: {path} is text and has no columns")
        prompts = read_text(path)
        return PromptFile(prompts, report_prompts(path, "one per line", prompts, 0))

    # A table
    reader = read_folder if path.is_dir() else READERS[suffix]
    if not path.exists():
        raise UserError(f"no prompts file {path}; give a file of prompts, or `{STARTER}`")
    if path.is_file():
        check_downloaded(path)
    try:
        what, cells = reader(path, column)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        # pyarrow's errors for damaged files are ValueErrors and OSErrors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as {suffix.lstrip('.') or 'a dataset'} ({reason}); write it "
            "again, or give a text file with one prompt per line"
        ) from error

    # Its rows with text
    prompts = []
    for row, cell in enumerate(cells):
        if cell is not None and not isinstance(cell, str):
            raise UserError(
                f"{path}, {what}: row {row} is {str(cell)[:40]!r}, which is not text; give another "
                "--prompt-column, or a text file with one prompt per line"
            )
        if cell is not None and cell.strip():
            prompts.append(cell.strip())
    if not prompts:
        raise UserError(f"{path}, {what}: no row has text; give another --prompt-column or file")
    return PromptFile(prompts, report_prompts(path, what, prompts, len(cells) - len(prompts)))


def read_text(path: Path) -> list[str]:
    """The lines of a text file, or of the starter prompts."""
    return read_lines(
        STARTER_FILE if str(path) == STARTER else path,
        "prompt",
        f"give a file of prompts, `{STARTER}` for plain prompts for first tries, or `pocket` for "
        "the pocket world's",
    )


def report_prompts(path: Path, what: str, prompts: Sequence[str], num_empty: int) -> str:
    """One line: where the prompts are from, how many, and how many are duplicates or empty."""
    num_duplicates = len(prompts) - len(set(prompts))
    notes = []
    if num_duplicates:
        notes.append(f"{num_duplicates} of them duplicates, which are kept")
    if num_empty:
        notes.append(f"{num_empty} rows without text are left out")
    details = f" ({'; '.join(notes)})" if notes else ""
    return f"{path}, {what}: {len(prompts)} prompts{details}"


# A reader returns (what it read, for messages; the cells of the column), given a path and a column.
Cells = list[Any]


def choose_column(path: Path, columns: Sequence[str], column: str | None) -> str:
    """`column`, or the one that contains the prompts. Raises UserError if that is not clear."""
    listed = ", ".join(columns[: 4 * MAX_LISTED]) or "none"
    if column is not None:
        if column not in columns:
            raise UserError(
                f"--prompt-column {column}: {path} has no such column{nearest(column, columns)}; "
                f"its columns: {listed}"
            )
        return column

    by_lower_case = {name.lower(): name for name in columns}
    for name in PROMPT_COLUMNS:
        if name in by_lower_case:
            return by_lower_case[name]
    if len(columns) == 1:
        return columns[0]
    raise UserError(
        f"{path}: which column contains the prompts? Name it with --prompt-column; its columns: "
        f"{listed}"
    )


def choose_from_rows(path: Path, rows: Sequence[Any], column: str | None) -> tuple[str, Cells]:
    """The column of a list of JSON objects, or the list itself if it is one of texts."""
    if not any(isinstance(row, dict) for row in rows):
        return "a list", list(rows)

    # Columns in the order in which they first occur
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not an object, as other rows are")
        columns.update(dict.fromkeys(map(str, row)))
    chosen = choose_column(path, list(columns), column)
    return f"column {chosen!r}", [row.get(chosen) for row in rows]


def read_jsonl(path: Path, column: str | None) -> tuple[str, Cells]:
    """One JSON object, or one text in quotes, per line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); correct it") from None
    return choose_from_rows(path, rows, column)


def read_json_file(path: Path, column: str | None) -> tuple[str, Cells]:
    """COCO's caption annotations, or a list of objects or texts."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        # All captions of an image, images in the order of their ids
        rows = [(int(row["image_id"]), int(row["id"]), row) for row in content["annotations"]]
        rows.sort(key=lambda row: row[:2])
        return "COCO annotations", [row["caption"] for _, _, row in rows]
    if isinstance(content, list):
        return choose_from_rows(path, content, column)
    raise UserError(
        f"{path} is JSON, but neither COCO's caption annotations nor a list; give one of the two"
    )


def read_csv(path: Path, column: str | None) -> tuple[str, Cells]:
    """A table whose first line names the columns; tabs separate them in `.tsv`."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        rows = list(reader)
        chosen = choose_column(path, list(reader.fieldnames or []), column)
    return f"column {chosen!r}", [row[chosen] for row in rows]


def read_parquet(path: Path, column: str | None) -> tuple[str, Cells]:
    """A Parquet file."""
    import pyarrow.parquet as pq

    chosen = choose_column(path, pq.read_schema(path).names, column)
    return f"column {chosen!r}", pq.read_table(path, columns=[chosen])[chosen].to_pylist()


def read_folder(path: Path, column: str | None) -> tuple[str, Cells]:
    """A dataset of Hugging Face's `datasets` on disk, or a folder of Parquet files.

    Of several splits, `train` is read. A saved dataset is Arrow streams, listed in `state.json`.
    """
    split = ""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        name = "train" if "train" in splits else splits[0]
        path, split = path / name, f"split {name!r}, "

    # Arrow streams
    if (path / "state.json").is_file():
        import pyarrow as pa

        cells: Cells = []
        chosen = ""
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for entry in state["_data_files"]:
            with pa.OSFile(str(path / entry["filename"])) as file, pa.ipc.open_stream(file) as data:
                chosen = choose_column(path, data.schema.names, column)
                for batch in data:
                    cells += batch.column(chosen).to_pylist()
        return f"{split}column {chosen!r}", cells

    # Parquet files, as a dataset repository has them
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise UserError(
            f"{path} is a folder without a dataset: it needs the files that `Dataset.save_to_disk` "
            "writes, or Parquet files. Or give a text file with one prompt per line."
        )
    cells = []
    what = ""
    for file in files:
        what, more = read_parquet(file, column)
        cells += more
    return f"{len(files)} Parquet files, {what}", cells


READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json_file,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def prompts_digest(prompts: Sequence[str]) -> str:
    """Identifies a list of prompts by its content, independent of the file's name."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return f"{len(prompts)} prompts, sha256 {digest[:16]}"
