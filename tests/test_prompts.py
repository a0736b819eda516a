"""Prompts are read from every documented format, and what was read is reported."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.prompts import STARTER, STARTER_FILE, load_prompts

PROMPTS = ["a cat", "ein Hündchen, “groß”", "two\u2028lines", "a cat"]
ROWS: list[dict[str, Any]] = [{"id": i, "caption": text} for i, text in enumerate(PROMPTS)]
EMPTY = {"id": 9, "caption": "  "}
NULL = {"id": 10, "caption": None}


def write_jsonl(path: Path) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in [*ROWS, EMPTY, NULL]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path) -> Path:
    # With a byte order mark, as spreadsheets write it
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, ["id", "caption"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows([*ROWS, EMPTY, NULL])
    return path


def write_parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([*ROWS, EMPTY, NULL]), path)
    return path


def write_coco(path: Path) -> Path:
    annotations = [
        {"image_id": i, "id": 100 - i, "caption": text} for i, text in enumerate(PROMPTS)
    ]
    annotations += [{"image_id": 7, "id": 1, "caption": ""}]
    path.write_text(json.dumps({"images": [], "annotations": annotations[::-1]}))
    return path


def write_json_list(path: Path) -> Path:
    path.write_text(json.dumps([*ROWS, EMPTY]))
    return path


def write_saved_dataset(path: Path) -> Path:
    """The files that `Dataset.save_to_disk` writes: Arrow streams, listed in state.json."""
    path.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (ROWS[:3], [ROWS[3], EMPTY]), strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as to:
            to.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")
    return path


def write_dataset_dict(path: Path) -> Path:
    write_saved_dataset(path / "train")
    (path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    return path


def write_parquet_folder(path: Path) -> Path:
    write_parquet(path / "data" / "train-00000-of-00001.parquet")
    return path


@pytest.mark.parametrize(
    ("write", "name", "what"),
    [
        (write_jsonl, "p.jsonl", "column 'caption'"),
        (write_csv, "p.csv", "column 'caption'"),
        (write_csv, "p.tsv", "column 'caption'"),
        (write_parquet, "p.parquet", "column 'caption'"),
        (write_coco, "p.JSON", "COCO annotations"),
        (write_json_list, "p.json", "column 'caption'"),
        (write_saved_dataset, "saved", "column 'caption'"),
        (write_dataset_dict, "splits", "split 'train', column 'caption'"),
        (write_parquet_folder, "folder", "1 Parquet files, column 'caption'"),
    ],
)
def test_prompts_of_every_format_are_the_same(
    write: Any, name: str, what: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name)
    loaded = load_prompts(path)
    assert loaded.prompts == PROMPTS
    assert loaded.report.startswith(f"{path}, {what}: 4 prompts (1 of them duplicates, which are k")
    assert "rows without text are left out" in loaded.report


def test_column_is_chosen_by_name_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("de,en,Prompt\nKatze,cat,a cat\n")
    assert load_prompts(path).prompts == ["a cat"]
    assert load_prompts(path, "de").prompts == ["Katze"]
    with pytest.raises(UserError, match=r"--prompt-column dee: .*; did you mean 'de'"):
        load_prompts(path, "dee")

    path.write_text("de,en\nKatze,cat\n")
    with pytest.raises(UserError, match=r"Name it with --prompt-column; its columns: de, en"):
        load_prompts(path)

    # A single column needs no name
    path.write_text("words\na cat\n")
    assert load_prompts(path).prompts == ["a cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n"b"', "row 1 is not an object"),
        ("p.jsonl", '{"prompt": ["a", "b"]}', r"row 0 is .*, which is not text"),
        ("p.json", '{"a": 1}', "neither COCO's caption annotations nor a list"),
        ("p.json", '{"annotations": [{"id": 1}]}', "cannot be read as json"),
        ("p.csv", "prompt\n \n", "no row has text"),
        ("p.parquet", "not parquet", "cannot be read as parquet"),
        ("p.txt", "a\n\nb\n", "1 blank lines"),
    ],
)
def test_file_that_has_no_prompts_is_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(path)


def test_missing_files_and_folders_without_prompts_are_refused(tmp_path: Path) -> None:
    for name in ("no.csv", "no.txt"):
        with pytest.raises(UserError, match=f"no prompts file .*{name}; .*starter"):
            load_prompts(tmp_path / name)
    with pytest.raises(UserError, match="is a folder without a dataset"):
        load_prompts(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"--prompt-column x: .* is text and has no columns"):
        load_prompts(tmp_path / "p.txt", "x")


def test_starter_prompts_are_what_their_script_writes() -> None:
    script = Path(__file__).parents[1] / "examples" / "write_starter_prompts.py"
    expected = runpy.run_path(str(script))["starter_prompts"]()
    loaded = load_prompts(Path(STARTER))
    assert loaded.prompts == expected == STARTER_FILE.read_text("utf-8").splitlines()
    assert len(set(expected)) == len(expected) == 4096
    assert max(len(prompt) for prompt in expected) < 120
