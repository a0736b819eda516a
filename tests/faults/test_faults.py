"""A short fault campaign loses nothing, and the list of other faults is true.

The long campaign: `make faults`.
"""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distill.run_logs import repeatable_files
from faults.others import OTHER_FAULTS, OUT, ROOT, run_rounds

from diffusion2gan.distill.train import distill
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.loading import load_teacher

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
def test_nothing_is_lost_to_kills_at_random_moments(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    subprocess.run(
        [sys.executable, str(CAMPAIGN), "--rounds", "3", "--out", str(out), "--seed", "7"],
        check=True,
    )
    result = json.loads(out.read_text())
    assert result["lost"] == 0, result
    rows = result["sigkill"]
    assert len(rows) == 9 and all(row["rounds"] == 3 for row in rows.values())
    # Most kills come before the end: 27 rounds, kill times uniform in the duration of a run
    assert sum(row["killed_before_the_end"] for row in rows.values()) >= 12


def test_a_clock_that_jumps_changes_nothing(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock jumps by days at every call: the files are the same.

    Waiting and measuring use the monotonic clock.
    """
    teacher = load_teacher(str(tiny_teacher))
    now = time.time()
    calls = itertools.count()

    def jumping_clock() -> float:
        return now + (-1) ** next(calls) * 86400.0 * (next(calls) % 9)

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
            monkeypatch.setattr(time, "time", jumping_clock)
        make_pairs(
            teacher, lambda indices: ["a star"] * len(indices), spec, tmp_path / name / "pairs"
        )
        distill(recipe, tmp_path / name / "pairs", tmp_path / name / "run")

    steady, jumping = repeatable_files(tmp_path / "steady"), repeatable_files(tmp_path / "jumping")
    assert len(steady) > 8 and steady == jumping


def test_the_tests_of_other_faults_exist_and_were_run() -> None:
    tests = {test for tests in OTHER_FAULTS.values() for test in tests}
    assert len(tests) > 20
    for test in sorted(tests):
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name in functions, test

    rows = json.loads(OUT.read_text("utf-8"))["other_faults"]["faults"]
    assert {fault: row["tests"] for fault, row in rows.items()} == OTHER_FAULTS
    for fault, row in rows.items():
        assert row["tried"] and not row["lost"], fault


def test_failed_and_missing_tests_count_as_lost(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_some(n):\n    assert n == 1\n\n"
        "def test_other():\n    pytest.skip()\n"
    )
    faults = {"some": ["test_x.py::test_some"], "other": ["test_x.py::test_other"]}

    some, other = run_rounds(2, faults, tmp_path).values()
    assert some["tried"] == 4
    assert some["lost"] == ["round 0: test_some[2]", "round 1: test_some[2]"]
    assert other == {"tests": ["test_x.py::test_other"], "tried": 0, "skipped": 2, "lost": []}

    # A test that does not exist: pytest then runs none of them.
    faults["none"] = ["test_x.py::test_none"]
    for row in run_rounds(1, faults, tmp_path).values():
        assert row["tried"] == 0
        assert row["lost"] == [f"round 0: {row['tests'][0]} did not run"]
