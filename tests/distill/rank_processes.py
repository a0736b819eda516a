"""Helpers of the multi-rank tests: real processes, alone or under torchrun, and their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BATCH = 8


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(num_processes: int, *arguments: object) -> subprocess.Popen[str]:
    """Starts a command under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes)]
    command += [str(argument) for argument in arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def python(*arguments: object) -> subprocess.Popen[str]:
    """Starts a command in one process."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def wait_for_success(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Its output on stdout and stderr."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out, err


def distill_command(folder: Path, out: Path, *settings: str) -> list[object]:
    """`distill` with the settings of the folder's recipe, then `settings`."""
    command: list[object] = ["-m", "diffusion2gan", "distill", "pocket-regression"]
    command += ["--pairs", folder / "pairs", "--out", out]
    recipe = json.loads((folder / "recipe.json").read_text())
    for key, value in recipe.items():
        if value is not None:
            command += ["--set", f"{key}={value}"]
    for setting in settings:
        command += ["--set", setting]
    return command


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none if it has no log yet."""
    path = out / "log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def stop_at(process: subprocess.Popen[str], out: Path, pairs_seen: int, code: int = 1) -> None:
    """Sends SIGTERM once the run is at `pairs_seen`, and checks that it was saved.

    `code`: the exit code; torchrun's is then 1, although every rank exits with 0.
    """
    deadline = time.monotonic() + 600
    while process.poll() is None:
        log = read_log(out)
        if log and log[-1]["pairs_seen"] >= pairs_seen:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "stopped and saved" in err


def relative_difference(
    found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str
) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors whose names begin with `prefix`."""
    assert found.keys() == expected.keys()
    keys = [key for key in expected if key.startswith(prefix)]
    assert keys
    a = torch.cat([found[key].double().flatten() for key in keys])
    b = torch.cat([expected[key].double().flatten() for key in keys])
    return float((a - b).norm() / b.norm())


def assert_same_entry(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two log entries are nearly equal."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key


def assert_same_losses(found: Path, expected: Path) -> None:
    """Two runs have nearly equal losses in every step."""
    for entry, expected_entry in zip(read_log(found), read_log(expected), strict=True):
        assert entry["pairs_seen"] == expected_entry["pairs_seen"]
        assert entry["loss"] == pytest.approx(expected_entry["loss"], rel=1e-4)
