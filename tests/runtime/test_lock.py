"""The exclusive lock: one owner at a time, freed when the owner is killed, nothing left."""

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


def test_a_second_process_is_refused_and_the_owner_is_named(tmp_path: Path) -> None:
    process = holder(tmp_path / "x")
    try:
        message = f"x is being written by another process .process {process.pid} on "
        with pytest.raises(UserError, match=message), exclusive_lock(tmp_path / "x"):
            raise AssertionError("two owners")
        with exclusive_lock(tmp_path / "y"):  # another thing is free
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_owner_frees_the_lock_and_its_temporaries_are_removed(tmp_path: Path) -> None:
    process = holder(tmp_path / "x")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / ".x.123.tmp").write_text("half")  # what the killed one left
    (tmp_path / ".y.123.tmp").write_text("another's")
    (tmp_path / ".x.half.host-123.tmp").mkdir()  # of `x.half`, not of `x`
    assert (tmp_path / ".x.lock").exists()
    with exclusive_lock(tmp_path / "x"):
        assert not (tmp_path / ".x.123.tmp").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".x.half.host-123.tmp",
        ".y.123.tmp",
    ]


def test_many_threads_never_hold_the_lock_at_once(tmp_path: Path) -> None:
    """Lock files are created and deleted all the time; one thread at a time has the lock."""
    inside, most_at_once, won = 0, 0, 0
    guard = threading.Lock()

    def often() -> None:
        nonlocal inside, most_at_once, won
        for _ in range(200):
            try:
                with exclusive_lock(tmp_path / "x"):
                    with guard:
                        inside, won = inside + 1, won + 1
                        most_at_once = max(most_at_once, inside)
                    with guard:
                        inside -= 1
            except UserError:
                continue

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_at_once == 1 and won > 10 and not list(tmp_path.iterdir())
