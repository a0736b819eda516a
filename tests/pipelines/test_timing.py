"""The load of the machine, and its name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from diffusion2gan.pipelines import timing


def test_load_is_the_cpu_time_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on four cores: 24 busy, of which this process used 8."""
    busy = iter([100.0, 124.0])
    own = iter([5.0, 13.0])
    clock = iter([50.0, 60.0])
    monkeypatch.setattr(timing, "_machine_busy_s", lambda: next(busy))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(own))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    assert timing.OtherLoad().share() == pytest.approx((24 - 8) / 40)


def test_load_is_between_0_and_1_and_unknown_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    load = timing.OtherLoad()
    sum(range(10**6))
    share = load.share()
    assert share is None or 0 <= share <= 1
    monkeypatch.setattr(timing, "_machine_busy_s", lambda: None)
    assert timing.OtherLoad().share() is None


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="this system has no /proc/stat")
def test_the_machine_counts_the_work_of_a_child() -> None:
    """The CPU time that a child reports to have used is at least what is counted."""
    before = timing._machine_busy_s()
    assert before is not None
    code = "import time; s = time.process_time()\nwhile time.process_time() - s < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    after = timing._machine_busy_s()
    assert after is not None and after - before >= 0.4


def test_machine_names_its_processor_cores_and_torch() -> None:
    text = timing.describe_machine("cpu")
    cores = os.cpu_count()
    assert ("1 core," if cores == 1 else f"{cores} cores,") in text
    assert text.endswith(f"torch {torch.__version__}")
