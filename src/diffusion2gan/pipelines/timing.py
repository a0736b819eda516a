"""Time and memory of a function that generates images."""

from __future__ import annotations

import os
import platform
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


class OtherLoad:
    """The share of this machine's cores that other processes use, from its creation on.

    It is the CPU time of the machine without that of this process, divided by the time of all
    cores; 0 is an idle machine. A time that was measured beside other work is not the time of the
    machine. Read from Linux's /proc/stat.
    """

    def __init__(self) -> None:
        self._busy_s = _machine_busy_s()
        self._own_s = time.process_time()
        self._start = time.perf_counter()

    def share(self) -> float | None:
        """From 0 to 1; None if the operating system does not report it."""
        busy_s = _machine_busy_s()
        if self._busy_s is None or busy_s is None:
            return None
        own_s = time.process_time() - self._own_s
        cores_s = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        others_s = busy_s - self._busy_s - own_s
        return min(max(others_s / max(cores_s, 1e-9), 0.0), 1.0)


def _machine_busy_s() -> float | None:
    """CPU time of all processes since the machine's start; None if it is not reported."""
    try:
        first_line = Path("/proc/stat").read_text().partition("\n")[0]
        user, nice, system, _idle, _iowait, irq, softirq = map(int, first_line.split()[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def describe_machine(device: str | torch.device = "cpu") -> str:
    """The processor, or the GPU, and the versions that times depend on."""
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        num_cores = os.cpu_count() or 1
        cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
        num_threads = torch.get_num_threads()
        threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
        processor = f"{_processor_name()}, {cores}, {threads}"
    return f"{processor}; {platform.system()}, torch {torch.__version__}"


def _processor_name() -> str:
    """The model name of the CPU, or its architecture if the system does not report one."""
    try:
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return model[1].strip() if model else platform.machine()


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
