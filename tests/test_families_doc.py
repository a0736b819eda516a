"""Every test that docs/families.md names exists, with that family among its cases."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CELL = re.compile(r"`(test_\w+)(?:\[([\w.-]+)\])?`")
OPEN = re.compile(r"not yet|not measured|as (?:dev|1\.x|with T5)")


def table() -> list[list[str]]:
    """The rows, their first cell left out."""
    lines = [
        line
        for line in (ROOT / "docs" / "families.md").read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in lines[2:]]


def files_of(function: str) -> list[Path]:
    """The test files that define it, at the top or in a class."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if function in (text := path.read_text("utf-8")):
            names = [
                node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
            ]
            found += [path] if function in names else []
    return found


def test_every_cell_is_a_test_or_says_that_there_is_none() -> None:
    rows = table()
    assert len(rows) == 8 and all(len(row) == 8 for row in rows)
    strange = [
        cell for row in rows for cell in row if not CELL.search(cell) and not OPEN.fullmatch(cell)
    ]
    assert not strange, f"neither a test nor 'not yet' or 'not measured': {strange}"


def test_every_test_named_exists_with_its_case() -> None:
    named = {match.groups() for row in table() for cell in row for match in CELL.finditer(cell)}
    missing = [function for function, _ in named if not files_of(function)]
    assert not missing, f"docs/families.md names tests that are not there: {missing}"
    files = sorted({str(path) for function, case in named if case for path in files_of(function)})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    cases = re.findall(r"::(test_\w+)\[([^\]]+)\]", done.stdout)
    lacking = [
        f"{function}[{case}]"
        for function, case in named
        if case
        and not any(f == function and set(case.split("-")) <= set(c.split("-")) for f, c in cases)
    ]
    assert not lacking, f"docs/families.md names cases that are not there: {lacking}"
