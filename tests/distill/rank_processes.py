"""Helpers of the multi-rank tests: real processes, alone or under torchrun, and their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distill.run_logs import read_log
from torch import Tensor

from diffusion2gan.distill.reporting import MACHINE_KEYS

BATCH = 8
STOPPED = Path(__file__).with_name("stopped_distill.py")


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


def stopped_command(command: list[object], pairs_seen: int, number: str = "TERM") -> list[object]:
    """A `distill_command` that stops, or loses a rank, once it is at `pairs_seen`."""
    assert command[:2] == ["-m", "diffusion2gan"]
    return [STOPPED, pairs_seen, number, *command[2:]]


def wait_until_stopped(process: subprocess.Popen[str], code: int = 1) -> None:
    """Checks that a process of a `stopped_command` has saved.

    `code`: the exit code; torchrun's is then 1, although every rank exits with 0.
    """
    _, err = process.communicate(timeout=900)
    assert process.returncode == code, err
    assert "stopped and saved" in err, err


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
    """Two log entries are nearly equal, but for times and memory."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key in MACHINE_KEYS:
            continue
        assert found[key] == pytest.approx(value, rel=2e-4, abs=1e-5), key


def assert_same_losses(found: Path, expected: Path) -> None:
    """Two runs have nearly equal losses in every step."""
    for entry, expected_entry in zip(read_log(found), read_log(expected), strict=True):
        assert entry["pairs_seen"] == expected_entry["pairs_seen"]
        assert entry["loss"] == pytest.approx(expected_entry["loss"], rel=1e-4)
