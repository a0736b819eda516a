"""The benchmarks that need a GPU run at pocket size on a CPU, and write only the named files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["--size", "pocket", "--device", "cpu", "--channels-last"]


def run(command: list[str], **environment: str) -> str:
    """Runs a command in the repository's root; returns its output."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_train_step_measures_a_step_with_discriminator_and_r1(tmp_path: Path) -> None:
    """The row that uses everything; the others use less."""
    out = tmp_path / "train_step.json"
    options = ["--rows", "with_d_and_r1", "--batch", "2", "--repeats", "1", "--fused"]
    command = [sys.executable, "benchmarks/train_step.py", *FLAGS, *options, "--out", str(out)]
    output = run(command)

    (entry,) = json.loads(out.read_text()).values()
    row = entry["rows"]["with_d_and_r1"]
    assert row["batch"] == 2 and row["images_per_second"] == pytest.approx(2 / row["seconds"])
    assert "with_d_and_r1" in output and "failed" not in output


@pytest.mark.slow
def test_one_step_compares_one_step_with_many(tmp_path: Path) -> None:
    out = tmp_path / "one_step.json"
    options = ["--steps", "4", "--repeats", "5", "--out", str(out)]
    run([sys.executable, "benchmarks/one_step.py", *FLAGS, *options])

    (entry,) = json.loads(out.read_text()).values()
    one, many = entry["rows"]["one step"], entry["rows"]["4 steps"]
    assert one["ms"] > 0 and entry["times_faster"] == pytest.approx(many["ms"] / one["ms"])


@pytest.mark.slow
def test_a_row_that_fails_is_reported() -> None:
    options = ["--rows", "mse", "--recipe", "no-such-recipe", "--repeats", "1"]
    output = run([sys.executable, "benchmarks/train_step.py", *FLAGS, *options])
    assert "no recipe 'no-such-recipe'" in output


@pytest.mark.slow
def test_all_gpu_benchmarks_run_at_pocket_size(tmp_path: Path) -> None:
    output = run(
        ["bash", "benchmarks/gpu.sh"],
        TINY="1",
        PYTHON=sys.executable,
        OUT=str(tmp_path),
        SECONDS_A_PART="3600",
    )
    for part in (1, 2, 3):
        assert f"=== part {part}" in output
    assert "failed" not in output
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"loss_cost.json", "train_step.json", "one_step.json"}


def test_benchmarks_without_time_left_are_skipped_and_reported(tmp_path: Path) -> None:
    environment = {
        "TINY": "1",
        "SECONDS_A_PART": "0",
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "2"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "left out, no time: train_step" in done.stdout


@pytest.mark.slow
def test_ode_error_has_every_solver_and_number_of_steps(tmp_path: Path) -> None:
    out = tmp_path / "ode_error.json"
    options = ["--count", "1", "--reference-steps", "50", "--out", str(out)]
    run([sys.executable, "benchmarks/ode_error.py", *options])

    result = json.loads(out.read_text())
    for name in ("pocket", "flow"):
        rows = result[name]["rows"]
        errors = {(r["solver"], r["steps"]): r["mse"] for r in rows if r["precision"] == "float32"}
        assert len(errors) == 14
        assert errors["ddim", 50] == 0  # the reference itself
        assert all(0 < errors["dpm++", num_steps] < 1 for num_steps in (10, 20, 50))
