"""A claim on a file or folder, so that two processes do not make the same thing by mistake."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from diffusion2gan.errors import UserError


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds `path` while the block runs, by a lock file beside it that the kernel frees when its owner dies.

    Raises UserError, naming the owner, where another living process holds it.
    """
    file = path.with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is being written by another process ({_owner(file)}). Wait for it or stop it; if both were meant, "
            "give each its own part: --shard-range for pairs, another --out for runs."
        ) from None
    try:
        file.write_text(
            json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8"
        )
        _sweep(path)
        yield
    finally:
        file.unlink(
            missing_ok=True
        )  # while it is still held: whoever opened it meanwhile sees that it is gone
        lock.release()


def _owner(file: Path) -> str:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"


def _sweep(path: Path) -> None:
    """Removes what a killed process left half-written of `path`: nobody else writes it while it is claimed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not re.fullmatch(r"(\w+-)?\d+\.tmp", left.name.removeprefix(f".{path.name}.")):
            continue  # of a `path` whose name begins with this one's
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
