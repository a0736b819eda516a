"""Atomic writing of files and folders, JSON, and digests."""

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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffusion2gan.errors import Failure, UserError

# Part of the temporary names: machines that share a disk use the same process numbers.
HOST = re.sub(r"[^\w]", "_", socket.gethostname())
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LFS_POINTER = b"version https://git-lfs"  # how the pointer file of Git LFS begins
NUM_HASH_THREADS = min(4, os.cpu_count() or 1)  # sha256 releases the GIL
# Some network disks cannot flush a folder
NO_FLUSH_ERRORS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
# Not the machine's: no file of that name, or (EINVAL, of torch) a file that is cut off
OTHER_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
# torch's error for main memory is a RuntimeError, "DefaultCPUAllocator: can't allocate memory"
NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory")
# What follows `.NAME.` in the temporary names of a file NAME: `HOST-PID.tmp`, `HOST-PID.old`, …
LEFTOVER_SUFFIX = re.compile(r"(?:(?P<host>\w+)-)?(?P<number>\d+)\.(?P<kind>tmp.*|old)")


@contextmanager
def atomic_write(path: Path, flush_to_disk: bool = True) -> Iterator[Path]:
    """Yields a temporary path, renamed to `path` (file or folder) if the block succeeds.

    The temporary path has the name of `path` and is in a temporary folder beside it, which also
    holds whatever a library writes beside its target (safetensors writes to `.tmpXXXXXX` first);
    the next writer of `path` deletes the folder if this process is killed. After a crash, Ctrl-C
    or a full disk `path` is what it was before. Files get the permissions that `open` gives a new
    file, whatever the block wrote them with. The contents are flushed to the disk before the
    rename and the folder after it, so that a power loss leaves the old or the new `path`; that
    takes some 10 ms, which `flush_to_disk=False` saves for many small files on which nothing
    relies. Raises UserError if `path` is a device or a pipe, Failure if the disk is full, OSError
    if `path` cannot be written.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    temporary = scratch / path.name
    finished = scratch.with_name(f"{scratch.name}.new")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(
            f"{path} is a device or a pipe, which a file would replace; name a file or a folder."
        )
    try:
        # 1. Write
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        scratch.mkdir(exist_ok=True)
        yield temporary

        # 2. Permissions and contents
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    _apply_umask(file)
            if flush_to_disk:
                flush_folder(temporary)
        else:
            _apply_umask(temporary)
            if flush_to_disk:
                _flush(temporary)

        # 3. Rename: out of the temporary folder first, so that nothing is left to delete at the end
        os.replace(temporary, finished)
        delete(scratch)
        if finished.is_dir():
            _replace_folder(finished, path)
        else:
            os.replace(finished, path)
        if flush_to_disk:
            _flush(path.parent)
        _remove_abandoned(path)
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number in DISK_FULL_ERRORS:
            raise Failure(
                f"the disk is full: could not write {path}. Existing files are unchanged; free "
                "some space and run the same command again to continue."
            ) from error
        if number and isinstance(error, SafetensorError):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        # On a read-only disk there is no temporary, and the attempt to delete it fails.
        with contextlib.suppress(OSError):
            delete(scratch)
            delete(finished)


def flush_folder(folder: Path) -> None:
    """Waits until a folder and all files in it are on the disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's list of names, are on the disk."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in NO_FLUSH_ERRORS):
            raise


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yields a new folder in the system's temporary folder, deleted at the end.

    Folders of this name that killed processes of this machine left are deleted too.
    """
    base = Path(tempfile.gettempdir())
    for folder in base.glob(f"{name}.{HOST}-*"):
        match = re.fullmatch(rf"{re.escape(name)}\.{HOST}-(\d+)\.\w+", folder.name)
        if match and not _is_alive(int(match[1])):
            delete(folder)
    with tempfile.TemporaryDirectory(prefix=f"{name}.{HOST}-{os.getpid()}.", dir=base) as created:
        yield Path(created)


def _apply_umask(file: Path) -> None:
    """Gives a file the permissions of `open`: 0644 with the usual umask.

    safetensors writes files that only their owner can read.
    """
    # The umask cannot be read without setting it; for an instant other threads get a strict one.
    umask = os.umask(0o077)
    os.umask(umask)
    with contextlib.suppress(PermissionError):
        executable = file.stat().st_mode & 0o111
        file.chmod((0o666 | executable) & ~umask)


@dataclass(frozen=True)
class Leftover:
    """A temporary file or folder that a process left.

    In some names there is no `host` (empty), and `number` is not a process.
    """

    path: Path
    host: str
    number: int
    kind: str


def find_leftovers(path: Path) -> list[Leftover]:
    """The temporary files of `path` in its folder, of living and of killed processes."""
    prefix = f".{path.name}."
    found = []
    for file in path.parent.glob(f"{glob.escape(prefix)}*"):
        match = LEFTOVER_SUFFIX.fullmatch(file.name.removeprefix(prefix))
        if match:
            found.append(Leftover(file, match["host"] or "", int(match["number"]), match["kind"]))
    return found


def _remove_abandoned(path: Path) -> None:
    """Deletes the temporary files of `path` that killed processes of this machine left.

    An old folder that was set aside (`.old`) is deleted only once `path` exists again.
    """
    for leftover in find_leftovers(path):
        if leftover.host != HOST or _is_alive(leftover.number):
            continue
        if leftover.kind != "old" or path.exists():
            delete(leftover.path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def delete(path: Path) -> None:
    """Deletes a file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _error_number(error: BaseException) -> int | None:
    """The operating system's error number; safetensors has it only in its message."""
    match = re.search(r"os error (\d+)", str(error))
    if match:
        return int(match[1])
    return getattr(error, "errno", None)


def translate_error(name: object, error: BaseException) -> Failure | None:
    """The Failure to raise if `error` is the machine's and `name` may be intact.

    That is an error of permissions, of the disk, of too many open files or of too little memory.
    None for all others, such as those of a file's contents.
    """
    number = _error_number(error)
    is_memory = isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
    if is_memory or number == errno.ENOMEM:
        return Failure(
            f"there is not enough memory to read {name}. It may be intact: free some memory, or "
            "use a machine with more, and run the same command again."
        )
    if number and number not in OTHER_ERRORS:
        return Failure(
            f"{name} cannot be read ({os.strerror(number)}). It may be intact: check its "
            "permissions and the disk, and run the same command again."
        )
    return None


def _replace_folder(new: Path, path: Path) -> None:
    """Renames folder `new` to `path`. An existing one is set aside, and restored if that fails."""
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
    """Writes `value` atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if not _is_utf8(text):
        text = json.dumps(value, indent=2) + "\n"  # names of files may be in another encoding
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path) -> Any:
    """Raises UserError if the file is missing, not JSON, or nested too deeply to be read.

    A byte order mark before the JSON, as some editors write it, is ignored.
    """
    check_downloaded(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON: {error}. It may be truncated or edited; restore or remake it."
        ) from error


def check_downloaded(path: Path) -> None:
    """Raises UserError if `path` is the pointer that git leaves in place of a large file."""
    try:
        with Path(path).open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return  # reported by the reader
    if is_pointer:
        raise UserError(
            f"{path} is not the file itself but a Git LFS pointer to it: the repository was cloned "
            "without its large files. Run `git lfs install` and `git lfs pull` in its folder, or "
            "download the file itself."
        )


def is_hidden(path: Path) -> bool:
    """Whether a file is one that systems put beside others: .DS_Store, macOS's `._NAME`, …"""
    return path.name.startswith(".")


def walk_files(folder: Path, onerror: Callable[[OSError], None] | None = None) -> list[Path]:
    """All files in a folder and below it, sorted by path; hidden files are left out.

    Linked folders are followed, so that their contents count wherever the link points. A link to a
    folder above it is not. `onerror` is called if a folder cannot be read.
    """
    files: list[Path] = []
    for name, subfolders, names in os.walk(folder, onerror=onerror, followlinks=True):
        current = Path(name)
        ancestors = {current.resolve(), *current.resolve().parents}
        subfolders[:] = [sub for sub in subfolders if (current / sub).resolve() not in ancestors]
        files += [current / name for name in names]
    return sorted(file for file in files if not is_hidden(file))


def sha256(path: Path) -> str:
    """The hex digest of a file's bytes, or of a folder's weights and scheduler settings.

    A folder's is the digest of the sorted lines `name:digest` of its *.safetensors and
    scheduler_config.json, in linked folders as well.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    names = []
    for file in walk_files(path):
        if file.suffix == ".safetensors" or file.name == "scheduler_config.json":
            names.append(str(file.relative_to(path)))
    lines = [f"{name}:{digest}\n" for name, digest in hash_files(path, names).items()]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """{name: sha256} of files in `folder`, in the order of `names`."""
    with ThreadPoolExecutor(NUM_HASH_THREADS) as pool:
        digests = pool.map(sha256, [folder / name for name in names])
        return dict(zip(names, digests, strict=True))


def write_image(path: Path, save: Callable[[Path], None], flush_to_disk: bool = True) -> None:
    """Writes an image atomically by `save(temporary)`; Pillow infers the format from the suffix.

    `flush_to_disk` as in `atomic_write`.
    """
    with atomic_write(path, flush_to_disk) as temporary:
        save(temporary)
