"""A short fault campaign: nothing is lost. The long one: `make faults`."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion2gan.distill.train import distill
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.files import sha256
from diffusion2gan.teacher.pipeline import load_teacher

CAMPAIGN = Path(__file__).with_name("campaign.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    subprocess.run([sys.executable, str(CAMPAIGN), "--rounds", "3", "--out", str(out), "--seed", "7"], check=True)
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
        teacher=str(tiny_teacher), loss="mse", pairs_seen=8, batch_size=2, checkpoint_every_s=1e-9, sample_every=4,
        keep_checkpoints=2, adversarial_weight=0,
    )  # fmt: skip
    for name in ("steady", "jumping"):
        if name == "jumping":
            monkeypatch.setattr(time, "time", lambda: now + (-1) ** next(looks) * 86400.0 * (next(looks) % 9))
        make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, tmp_path / name / "pairs")
        distill(recipe, tmp_path / name / "pairs", tmp_path / name / "run")
    files = [{p.relative_to(f): sha256(p) for p in f.rglob("*") if p.is_file()} for f in tmp_path.iterdir()]
    assert len(files[0]) > 8 and files[0] == files[1]


def other_faults() -> dict[str, str]:
    """The campaign's list, read and not imported: the campaign changes settings of the package."""
    tree = ast.parse(CAMPAIGN.read_text("utf-8"))
    assigned = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OTHER_FAULTS"
    ]
    return dict(ast.literal_eval(assigned[0].value))


def test_the_tests_of_other_faults_exist() -> None:
    """`FILE::NAME, NAME, FILE::NAME`: a name alone is in the file before it; a file alone is meant whole."""
    named = other_faults()
    assert len(named) > 15
    missing = []
    for fault, told in named.items():
        file = Path()
        for word in told.split(", "):
            path, _, name = word.rpartition("::") if "::" in word else (word, "", "") if "/" in word else ("", "", word)
            file = ROOT / path if path else file
            functions = {n.name for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)}
            missing += [f"{fault}: {word}"] if name and name not in functions else []
    assert not missing
    assert json.loads((ROOT / "docs/results/faults.json").read_text("utf-8"))["other_faults"] == named
