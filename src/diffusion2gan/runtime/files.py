"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffusion2gan.errors import Failure, UserError

HOST = re.sub(
    r"[^\w]", "_", socket.gethostname()
)  # machines that share a disk have the same process numbers


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renamed onto it (file or folder) when the block succeeds.

    A crash, Ctrl-C or full disk leaves what was there before. Raises Failure where the disk is full, OSError where
    nothing can be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield temporary
        if temporary.is_dir():
            _replace_folder(temporary, path)
        else:
            os.replace(temporary, path)
        _sweep(path)
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Failure(
                f"the disk is full: could not write {path}. Nothing that was there is lost; free some space and run "
                "the same command again to continue."
            ) from error
        if number and isinstance(error, SafetensorError):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        with contextlib.suppress(
            OSError
        ):  # a disk that is read-only has none to delete, and says so
            _delete(temporary)


def _sweep(path: Path) -> None:
    """Removes what processes of this machine that were killed left half-written of `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{HOST}-*"):
        parts = re.fullmatch(r"-(\d+)\.(tmp.*|old)", left.name.removeprefix(f".{path.name}.{HOST}"))
        if parts and not _alive(int(parts[1])) and (parts[2] != "old" or path.exists()):
            _delete(left)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _error_number(error: Exception) -> int | None:
    """The operating system's; safetensors tells it in words alone."""
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else getattr(error, "errno", None)


def _replace_folder(new: Path, path: Path) -> None:
    """Puts folder `new` at `path`. The old one steps aside first and comes back if the rename fails."""
    if not path.exists():
        os.replace(new, path)
        return
    aside = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.old")
    os.replace(path, aside)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(aside, path)
        raise
    shutil.rmtree(aside)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not JSON: {error}. Was it cut off or edited? Make it again."
        ) from error


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes; of a folder, of the sorted (name, digest) of its weights and scheduler settings."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted([*path.rglob("*.safetensors"), *path.rglob("scheduler_config.json")])
    return hashlib.sha256(
        "".join(f"{f.relative_to(path)}:{sha256(f)}\n" for f in files).encode()
    ).hexdigest()


def write_image(path: Path, save: Callable[[Path], None]) -> None:
    """Calls `save(temporary)` and renames; the temporary keeps the suffix, which tells Pillow the format."""
    path = Path(path)
    with atomic_write(path) as temporary:
        named = temporary.with_name(temporary.name + path.suffix)
        try:
            save(named)
            os.replace(named, temporary)
        finally:
            named.unlink(missing_ok=True)
