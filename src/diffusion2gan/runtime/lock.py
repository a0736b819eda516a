"""A lock on a file or folder, so that two processes do not write the same thing."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import delete, find_leftovers


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Locks `path` during the block, by a lock file beside it; freed if the process is killed.

    Raises UserError, naming the process, if another living process holds the lock.
    """
    lock_file = path.with_name(f".{path.name}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path} is being written by another process ({_owner(lock_file)}). Wait for it or "
            "stop it; to run both, give each its own share: --shard-range for pairs, another --out "
            "for runs."
        ) from None

    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        lock_file.write_text(json.dumps(owner), encoding="utf-8")
        _remove_temporaries(path)
        yield
    finally:
        # Deleted before the release: a process that has opened it meanwhile notices that it is gone
        lock_file.unlink(missing_ok=True)
        lock.release()


def _owner(lock_file: Path) -> str:
    try:
        owner = json.loads(lock_file.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "which one is not known yet"


def _remove_temporaries(path: Path) -> None:
    """Deletes the partly written files of killed processes, of any machine.

    Only the owner of the lock writes `path`, so none of them belongs to a living process.
    """
    for leftover in find_leftovers(path):
        if leftover.kind != "old":
            delete(leftover.path)
