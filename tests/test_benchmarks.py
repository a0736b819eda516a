"""The benchmarks that wait for a GPU run, at pocket size on a CPU, and write nothing but what they are told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = ["--size", "pocket", "--device", "cpu", "--channels-last"]


def run(command: list[str], folder: Path, **environment: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_training_step(tmp_path: Path) -> None:
    """The row with the discriminator and its penalty; the others are less."""
    out = tmp_path / "train_step.json"
    options = [
        "--rows",
        "with_d_and_r1",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--fused",
        "--out",
        str(out),
    ]
    told = run([sys.executable, "benchmarks/train_step.py", *FLAGS, *options], tmp_path)
    (entry,) = json.loads(out.read_text()).values()
    row = entry["rows"]["with_d_and_r1"]
    assert row["batch"] == 2 and row["images_per_second"] == pytest.approx(2 / row["seconds"])
    assert "with_d_and_r1" in told and "failed" not in told


@pytest.mark.slow
def test_one_step_against_many(tmp_path: Path) -> None:
    out = tmp_path / "one_step.json"
    run(
        [
            sys.executable,
            "benchmarks/one_step.py",
            *FLAGS,
            "--steps",
            "4",
            "--repeats",
            "5",
            "--out",
            str(out),
        ],
        tmp_path,
    )
    (entry,) = json.loads(out.read_text()).values()
    assert entry["rows"].keys() == {"one step", "4 steps"} and entry["times_faster"] > 1.5


@pytest.mark.slow
def test_a_row_that_fails_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    options = ["--rows", "mse", "--recipe", "no-such-recipe", "--repeats", "1"]
    told = run([sys.executable, "benchmarks/train_step.py", *FLAGS, *options], tmp_path)
    assert "no recipe 'no-such-recipe'" in told


@pytest.mark.slow
def test_all_that_waits_for_a_gpu_in_miniature(tmp_path: Path) -> None:
    told = run(
        ["bash", "benchmarks/gpu.sh"],
        tmp_path,
        TINY="1",
        PYTHON=sys.executable,
        OUT=str(tmp_path),
        SECONDS_A_PART="3600",
    )
    assert [f"=== part {n}" in told for n in (1, 2, 3)] == [True] * 3 and "failed" not in told
    assert {path.name for path in tmp_path.iterdir()} >= {
        "loss_cost.json",
        "train_step.json",
        "one_step.json",
    }


def test_no_part_takes_longer_than_it_may(tmp_path: Path) -> None:
    """With no time left everything is left out, and said."""
    env = os.environ | {
        "TINY": "1",
        "SECONDS_A_PART": "0",
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "2"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and "left out, no time: train_step" in done.stdout
