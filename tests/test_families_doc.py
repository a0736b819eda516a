"""Every test that docs/families.md names exists, with that family among its cases."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEST_CELL = re.compile(r"`(test_\w+)(?:\[([\w.-]+)\])?`")
OPEN_CELL = re.compile(r"not yet|not measured|as (?:dev|1\.x|with T5)")


def read_table() -> list[list[str]]:
    """The rows without their first cell."""
    text = (ROOT / "docs" / "families.md").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = []
    for line in lines[2:]:  # after the header and its rule
        cells = line.strip("|").split("|")
        rows.append([cell.strip() for cell in cells[1:]])
    return rows


def find_test_files(function: str) -> list[Path]:
    """The test files that define this function, at the top level or in a class."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text("utf-8")
        if function not in text:
            continue
        nodes = ast.walk(ast.parse(text))
        if any(isinstance(node, ast.FunctionDef) and node.name == function for node in nodes):
            found.append(path)
    return found


def collect_cases(files: list[str]) -> list[tuple[str, str]]:
    """(function, case) of every parametrised test in these files, as pytest collects them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return re.findall(r"::(test_\w+)\[([^\]]+)\]", done.stdout)


def test_every_cell_names_a_test_or_is_marked_open() -> None:
    rows = read_table()
    assert len(rows) == 10 and all(len(row) == 8 for row in rows)
    unclear = [
        cell
        for row in rows
        for cell in row
        if not TEST_CELL.search(cell) and not OPEN_CELL.fullmatch(cell)
    ]
    assert not unclear, f"neither a test nor 'not yet' or 'not measured': {unclear}"


def test_every_test_named_exists_with_its_case() -> None:
    named = set()
    for row in read_table():
        for cell in row:
            named |= {match.groups() for match in TEST_CELL.finditer(cell)}
    files = {function: find_test_files(function) for function, _ in named}
    missing = [function for function, paths in files.items() if not paths]
    assert not missing, f"docs/families.md names tests that do not exist: {missing}"

    # The cases: `sd15-full` is among those of a test with the case `full-sd15-0`
    to_collect = {str(path) for function, case in named if case for path in files[function]}
    collected = collect_cases(sorted(to_collect))
    lacking = []
    for function, case in named:
        cases = [set(c.split("-")) for f, c in collected if f == function]
        if case and not any(set(case.split("-")) <= words for words in cases):
            lacking.append(f"{function}[{case}]")
    assert not lacking, f"docs/families.md names cases that do not exist: {lacking}"
