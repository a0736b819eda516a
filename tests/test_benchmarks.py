"""The benchmarks that need a GPU run at pocket size on a CPU, and write only the named files."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion2gan.distill import steps

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
    options = ["--rows", "with_d_and_r1", "--batch", "2", "--repeats", "1", "--channels-last"]
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
    out = tmp_path / "gpu.json"
    options = ["--pocket", "--seconds", "3600", "--out", str(out)]
    run([sys.executable, "benchmarks/gpu.py", *options])

    rows = json.loads(out.read_text())["rows"]
    for name, row in rows.items():
        assert not {"failed", "stopped", "skipped"} & row.keys(), f"{name}: {row}"

    # Every kind of row. On the CPU itself the agreement is exact.
    agreement = dict(rows["agreement with the CPU"])
    del agreement["took_s"]
    assert len(agreement) == 10 and not any(agreement.values())
    step = rows["step: pocket, with D and R1"]
    assert step["images_per_second"] == pytest.approx(2 / step["seconds"])
    assert rows["loss: pocket, float32, batch 1, e_latent_lpips"]["ms"] > 0
    latency = rows["one step: pocket"]
    assert latency["times_faster"] == latency["2 steps ms"] / latency["one step ms"]
    assert rows["pairs: pocket, batch 4"]["pairs_per_second"] > 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_gpu_rows_that_fail_or_take_too_long_are_recorded_and_the_next_one_runs(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    written_before: list[list[str]] = []

    def fail() -> dict[str, Any]:
        raise RuntimeError("CUDA out of memory")

    def take_long() -> dict[str, Any]:
        while True:
            sum(range(1000))

    def succeed() -> dict[str, Any]:
        written_before.append(list(json.loads(out.read_text())["rows"]))
        return {"ms": 2.5}

    rows = [
        gpu.Row("fails", fail),
        gpu.Row("takes long", take_long, limit_s=0.2),
        gpu.Row("needs more time than is left", succeed, needed_s=1000),
        gpu.Row("succeeds", succeed, command="loss_cost.py --row mse"),
    ]
    gpu.run_rows(rows, 100, out, {"hardware": "none"})

    result = json.loads(out.read_text())
    assert result["hardware"] == "none"
    assert result["rows"]["fails"]["failed"] == "RuntimeError: CUDA out of memory"
    assert result["rows"]["takes long"]["stopped"] == "took longer than 0 s"
    assert "1000 s are needed" in result["rows"]["needs more time than is left"]["skipped"]
    assert result["rows"]["succeeds"]["ms"] == 2.5
    assert result["rows"]["succeeds"]["command"] == "loss_cost.py --row mse"
    assert written_before == [["fails", "takes long", "needs more time than is left"]]
    assert "failed: RuntimeError: CUDA out of memory" in capsys.readouterr().out


def test_gpu_targets_are_compared_with_the_rows_that_exist(gpu: Any) -> None:
    rows = {
        "step: sd15, mse": {"images_per_second": 140.0},
        "step: sd15, e_latent_lpips": {"images_per_second": 70.0},
        "one step: sd15": {"failed": "RuntimeError: CUDA out of memory"},
    }
    targets = gpu.check_targets(rows)
    assert targets["sd15 mse, images/s (the paper's node)"]["reached"] is True
    assert targets["sd15 e_latent_lpips / mse"] == {
        "target": ">= 0.85",
        "measured": 0.5,
        "reached": False,
    }
    assert targets["one step, sd15, ms"]["reached"] is None

    # Every target reads a row that exists
    names = {row.name for row in gpu.gpu_rows()}
    complete = dict.fromkeys(
        names,
        {"images_per_second": 1.0, "ms": 1.0, "peak_gib": 1.0, "one step ms": 1.0}
        | {"times_faster": 1.0},
    )
    assert all(target["measured"] == 1.0 for target in gpu.check_targets(complete).values())


@pytest.mark.slow
def test_peak_memory_of_a_recipe_is_that_of_a_step_with_r1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pocket recipe has R1 in every 16th step only."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    train_step = importlib.import_module("train_step")
    with_r1 = []

    def take_step(run: Any, pairs: Any, distance: Any) -> Any:
        result = steps.step(run, pairs, distance)
        with_r1.append("r1" in result[0].read())
        return result

    monkeypatch.setattr(train_step, "step", take_step)
    options = ["--recipe", "pocket", "--repeats", "1"]
    train_step.measure("pocket", train_step.parse_args(options))
    assert with_r1 == [True, False, False, False, True]


def test_default_steps_with_zero_terminal_snr_follow_from_a_gaussian(tmp_path: Path) -> None:
    """Another calculation than the benchmark's: the factor of each step, as a product of numbers.

    The committed results are the benchmark's, and 40 steps are the first of its choices that reach
    ddim's error with 50.
    """
    out = tmp_path / "gaussian.json"
    run([sys.executable, "benchmarks/ode_error.py", "--gaussian", "--out", str(out)])
    result = json.loads(out.read_text())
    committed = json.loads((ROOT / "docs/results/ode_error_gaussian.json").read_text())
    for row, committed_row in zip(result["rows"], committed["rows"], strict=True):
        assert row == pytest.approx(committed_row, rel=0.02)

    # ddim with 50 steps on N(0, 1): x0 = αx, ε = σx, so x' = (α'α + σ'σ)·x
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    roots = (1 - betas).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    angles = [float(root.acos()) for root in roots[19::20].flip(0)]  # α = cos, σ = sin
    factor = 1.0
    for angle, next_angle in zip(angles, [*angles[1:], 0.0], strict=True):
        factor *= math.cos(angle - next_angle)
    (row,) = [row for row in result["rows"] if row["zero_terminal_snr"] and row["std"] == 1]
    assert row["ddim-50"] == pytest.approx((factor - 1) ** 2, rel=0.01)
    assert row["dpm++-40"] < row["ddim-50"] < row["dpm++-35"]


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


@pytest.fixture
def perceptual(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/perceptual.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("perceptual")


def test_perceptual_bars_are_ratios_of_what_has_been_measured(perceptual: Any) -> None:
    def row(frechet: float, residual: float) -> dict[str, Any]:
        at_half = {"share": 0.5, "frechet_distance": frechet}
        elsewhere = {"share": 0.0, "frechet_distance": 99.0}
        students = {"a": at_half, "b": elsewhere}
        return {"students": students, "optimisation": {"residual": residual}}

    rows = {
        "mse": row(8.0, 0.2),
        "labels, none transforms": row(4.0, 0.5),
        "labels, new transforms": row(3.0, 0.1),
        "decoder, none transforms": row(5.0, 0.1),
        "teacher, shipped transforms": row(3.2, 0.1),
    }
    bars = perceptual.compute_bars(rows)
    assert bars["new transforms / none, Fréchet at 0.5"]["ratio"] == 0.75
    assert bars["new transforms / none, Fréchet at 0.5"]["reached"] is True
    assert bars["new transforms / none, residual"] == {"ratio": 0.2, "limit": 0.1, "reached": False}
    assert bars["distilled / by labels, Fréchet at 0.5"]["reached"] is None
    assert bars["best without data / mse, Fréchet at 0.5"]["ratio"] == 0.4


@pytest.mark.slow
def test_perceptual_measures_a_row_and_continues(tmp_path: Path) -> None:
    out, figure = tmp_path / "perceptual.json", tmp_path / "perceptual.svg"
    options = ["--distances", "mse", "decoder", "--transforms", "new", "none", "--shares", "0.5"]
    options += ["--seeds", "0", "--total-pairs", "64", "--count", "16", "--targets", "1"]
    options += ["--steps", "20", "--pairs", str(tmp_path / "pairs"), "--work", str(tmp_path)]
    options += ["--out", str(out), "--figure", str(figure)]
    command = [sys.executable, "benchmarks/perceptual.py", *options]
    run(command)

    result = json.loads(out.read_text())
    names = ["mse", "decoder, new transforms", "decoder, none transforms"]
    assert sorted(result["rows"]) == sorted(names)
    for row in result["rows"].values():
        assert row["cost"]["ms"] > 0 and len(row["optimisation"]["residuals"]) == 1
        student = row["students"]["share 0.5, seed 0"]
        assert student["frechet_distance"] > 0 and student["sharpness"] > 0
    settings = result["rows"]["decoder, new transforms"]["settings"]
    assert "resampling=bicubic" in settings and "loss=e_latent_lpips" in settings
    assert "decoder" in figure.read_text()

    # Run again: nothing is measured twice
    before = out.read_text()
    run(command)
    assert out.read_text() == before
