"""A short fault campaign: nothing is lost; and that the other faults are what they say. The long one: `make faults`."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.others import OTHER_FAULTS, OUT, ROOT, tried

from diffusion2gan.distill.train import distill
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.files import sha256
from diffusion2gan.teacher.loading import load_teacher

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    subprocess.run(
        [sys.executable, str(CAMPAIGN), "--rounds", "3", "--out", str(out), "--seed", "7"],
        check=True,
    )
    told = json.loads(out.read_text())
    assert told["lost"] == 0, told
    rows = told["sigkill"]
    assert len(rows) == 9 and all(row["rounds"] == 3 for row in rows.values())
    assert sum(row["killed_before_the_end"] for row in rows.values()) >= 12


def test_a_clock_that_jumps_changes_nothing(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back and forth by days at every look: the same files. What waits or counts does so by another clock."""
    teacher, now, looks = load_teacher(str(tiny_teacher)), time.time(), itertools.count()
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 1, 1.0, teacher.latent_shape, 2)
    recipe = Recipe(
        teacher=str(tiny_teacher),
        loss="mse",
        total_pairs=8,
        batch_size=2,
        checkpoint_every_s=1e-9,
        sample_every=4,
        keep_checkpoints=2,
        adversarial_weight=0,
    )
    for name in ("steady", "jumping"):
        if name == "jumping":
            monkeypatch.setattr(
                time, "time", lambda: now + (-1) ** next(looks) * 86400.0 * (next(looks) % 9)
            )
        make_pairs(
            teacher, lambda indices: ["a star"] * len(indices), spec, tmp_path / name / "pairs"
        )
        distill(recipe, tmp_path / name / "pairs", tmp_path / name / "run")
    files = [
        {p.relative_to(f): sha256(p) for p in f.rglob("*") if p.is_file()}
        for f in tmp_path.iterdir()
    ]
    assert len(files[0]) > 8 and files[0] == files[1]


def test_the_tests_of_other_faults_exist() -> None:
    named = {test for tests in OTHER_FAULTS.values() for test in tests}
    missing = []
    for file, _, name in (test.partition("::") for test in named):
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        missing += [f"{file}::{name}"] if name and name not in functions else []
    assert len(named) > 20 and not missing
    told = json.loads(OUT.read_text("utf-8"))["other_faults"]["faults"]
    assert {fault: row["tests"] for fault, row in told.items()} == OTHER_FAULTS
    assert all(row["tried"] and not row["lost"] for row in told.values())


def test_a_fault_whose_test_fails_is_lost(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_some(n):\n    assert n == 1\n\n"
        "def test_other():\n    pytest.skip()\n"
    )
    faults = {"some": ["test_x.py::test_some"], "other": ["test_x.py::test_other"]}
    some, other = tried(2, faults, tmp_path).values()
    assert (some["tried"], some["lost"]) == (4, ["round 0: test_some[2]", "round 1: test_some[2]"])
    assert other == {"tests": ["test_x.py::test_other"], "tried": 0, "skipped": 2, "lost": []}
    none = tried(1, faults | {"none": ["test_x.py::test_none"]}, tmp_path)
    assert all(
        row["tried"] == 0 and row["lost"] == [f"round 0: {row['tests'][0]} did not run"]
        for row in none.values()
    )
