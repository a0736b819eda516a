"""A claim: one owner at a time, free when the owner dies, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.lock import exclusive_lock

HOLD = """
import sys, time
from pathlib import Path
from diffusion2gan.runtime.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)  # until it is killed
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    process = holder(tmp_path / "x")
    try:
        told = f"x is being written by another process .process {process.pid} on "
        with pytest.raises(UserError, match=told), exclusive_lock(tmp_path / "x"):
            raise AssertionError("two owners")
        with exclusive_lock(tmp_path / "y"):  # another thing is free
            pass
    finally:
        process.kill()
        process.wait()


def test_a_dead_owner_holds_nothing(tmp_path: Path) -> None:
    process = holder(tmp_path / "x")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / ".x.123.tmp").write_text("half")  # what the killed one left
    (tmp_path / ".y.123.tmp").write_text("another's")
    (tmp_path / ".x.half.host-123.tmp").mkdir()  # of `x.half`, which somebody may be writing
    assert (tmp_path / ".x.lock").exists()
    with exclusive_lock(tmp_path / "x"):
        assert not (tmp_path / ".x.123.tmp").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".x.half.host-123.tmp",
        ".y.123.tmp",
    ]


def test_many_at_once_are_never_two(tmp_path: Path) -> None:
    """Lock files come and go: whoever holds the claim holds it alone."""
    inside, most, won = 0, 0, 0
    guard = threading.Lock()

    def often() -> None:
        nonlocal inside, most, won
        for _ in range(200):
            try:
                with exclusive_lock(tmp_path / "x"):
                    with guard:
                        inside, won = inside + 1, won + 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except UserError:
                continue

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and won > 10 and not list(tmp_path.iterdir())
