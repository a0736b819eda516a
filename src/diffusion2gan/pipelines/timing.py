"""Seconds, pictures a second and memory of a function that makes pictures."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

REPEATS, FEW, PATIENCE_S = (
    20,
    5,
    10.0,
)  # at most; at least; and no more than at least once so long has passed


def latencies(
    call: Callable[[], object], repeats: int = REPEATS, device: str = "cpu"
) -> list[float]:
    """Seconds of each of `repeats` calls after one that is not counted; of fewer (five at least) where they are slow.

    On a GPU the clock is read when all of a call's work is done.
    """
    call()
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < FEW or sum(seconds) < PATIENCE_S):
        seconds.append(seconds_of(call, device))
    return seconds


def seconds_of(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def median_and_p90(seconds: list[float]) -> tuple[float, float]:
    """The middle one, and the one that nine of ten stay below (linear between neighbours)."""
    return float(np.median(seconds)), float(np.quantile(seconds, 0.9))


def peak_memory_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """The most memory held during `call`: of a GPU what torch's tensors took, otherwise the whole process's.

    None where the system does not tell (it is asked of Linux, in /proc/self).
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        call()
        told = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(told[1]) * 1024 if told else None


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
