"""Time and memory of a function that generates images."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

REPEATS = 20  # calls that are timed at most
MIN_REPEATS = 5  # calls that are timed in any case
MAX_SECONDS = 10.0  # after this time, no call is started beyond the minimum


def latencies(
    call: Callable[[], object], repeats: int = REPEATS, device: str = "cpu"
) -> list[float]:
    """Seconds of each of up to `repeats` calls, after one warm-up call that is not counted.

    Slow calls are repeated less often, at least five times. On a GPU the clock is read when all
    work of a call is done.
    """
    call()
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < MIN_REPEATS or sum(seconds) < MAX_SECONDS):
        seconds.append(measure_seconds(call, device))
    return seconds


def measure_seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_and_p90(seconds: list[float]) -> tuple[float, float]:
    """The median and the 90th percentile (linear between neighbours)."""
    return float(np.median(seconds)), float(np.quantile(seconds, 0.9))


def peak_memory_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Peak memory during `call`: of torch's tensors on a GPU, of the process on other devices.

    None if the operating system does not report it (it is read from Linux's /proc/self).
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        call()
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(peak[1]) * 1024 if peak else None


def synchronize(device: str | torch.device) -> None:
    """Waits until a GPU has finished all work. Nothing to wait for on other devices."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
