"""Locations of data: a local folder, or a URL of an object store through fsspec. Writes are atomic.

Files of a store are downloaded into a local cache of bounded size, and uploaded from a local
temporary file. Errors of the network are retried with growing pauses for `RETRY_TIMEOUT_S`
seconds; then they become a `Failure`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime.environment import env_number
from diffusion2gan.runtime.files import atomic_write, temporary_folder
from diffusion2gan.runtime.progress import console

T = TypeVar("T")

# How long an unreachable store is retried, and the pauses between attempts.
RETRY_TIMEOUT_S = env_number("DIFFUSION2GAN_PATIENCE_S", 60)
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0
# Errors of the local disk: a retry does not help.
LOCAL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# A file may be evicted from the cache by another process between its download and its opening.
MAX_CACHE_MISSES = 8
DEFAULT_CACHE_GIB = 20


@dataclass(frozen=True)
class Remote:
    """A prefix in an object store, such as `s3://bucket/set`."""

    url: str

    def __str__(self) -> str:
        return self.url


Location = Path | Remote


@dataclass(frozen=True)
class Entry:
    """A file in a listing. `modified_s`: seconds since 1970, by the clock of the disk or store."""

    num_bytes: int
    modified_s: float


def parse_location(text: str | Path) -> Location:
    """A path, or a URL. Raises UserError if the package for the URL's protocol is not installed."""
    if "://" not in str(text):
        return Path(text).expanduser()
    remote = Remote(str(text).rstrip("/"))
    _filesystem(remote.url)
    return remote


@lru_cache(maxsize=8)
def _filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's filesystem, the path in it). Listings are not cached: other processes write too."""
    import fsspec

    protocol = url.split("://")[0]
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise UserError(
            f"{url}: {protocol}:// needs a package that is not installed ({error}); for s3://, "
            "pip install 'diffusion2gan[s3]'"
        ) from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def retry_with_backoff(what: str, call: Callable[[], T]) -> T:
    """Returns `call()`, retried with growing pauses while the store fails.

    Raises Failure after RETRY_TIMEOUT_S seconds, UserError if the store denies access. A missing
    file and an error of the local disk are not retried: they are raised unchanged.
    """
    start = time.monotonic()
    pause = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in LOCAL_DISK_ERRORS:
                raise

            # Errors that a retry does not solve: denied access, and the time limit
            details = str(error).splitlines()[0] if str(error) else "no details"
            reason = f"{type(error).__name__}: {details}"
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                raise UserError(
                    f"{what}: the store denies access ({reason}). Set its credentials, for S3 "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and check the "
                    "name and permissions of the bucket."
                ) from error
            if time.monotonic() - start + pause > RETRY_TIMEOUT_S:
                raise Failure(
                    f"{what}: the store was unreachable for {RETRY_TIMEOUT_S:.0f} s ({reason}). "
                    "No partly written file is left; run the same command to continue."
                ) from error

            # Wait, then try again
            console.print(f"{what}: {reason}; retry in {pause:.2g} s", soft_wrap=True)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def list_files(location: Location) -> dict[str, Entry]:
    """The files directly in `location`, by name; empty if there is no such folder."""
    if isinstance(location, Path):
        return _list_local_files(location)

    fs, path = _filesystem(location.url)
    try:
        rows = retry_with_backoff(
            f"list {location}", lambda: fs.ls(path, detail=True, refresh=True)
        )
    except FileNotFoundError:
        return {}

    entries = {}
    for row in rows:
        if row["type"] == "file":
            name = row["name"].rsplit("/", 1)[-1]
            entries[name] = Entry(int(row["size"]), _modified_s(row))
    return entries


def _list_local_files(folder: Path) -> dict[str, Entry]:
    if not folder.is_dir():
        return {}
    entries = {}
    with os.scandir(folder) as found:
        for file in found:
            if not file.name.startswith(".") and file.is_file():
                stat = file.stat()
                entries[file.name] = Entry(stat.st_size, stat.st_mtime)
    return entries


def list_names(location: Location) -> set[str]:
    """The names in `location`. On a local disk faster than `list_files`: no file is examined."""
    if not isinstance(location, Path):
        return set(list_files(location))
    if not location.is_dir():
        return set()
    return {name for name in os.listdir(location) if not name.startswith(".")}


def _modified_s(row: dict[str, Any]) -> float:
    """The time of modification in a listing's row, under the key and type of each filesystem."""
    modified = row.get("LastModified", row.get("mtime", row.get("created", 0.0)))
    return float(modified.timestamp() if hasattr(modified, "timestamp") else modified)


@contextmanager
def atomic_put(location: Location, name: str) -> Iterator[Path]:
    """Yields a local temporary path; if the block succeeds, the file becomes `name` in `location`.

    Raises UserError if the store has no such bucket.
    """
    if isinstance(location, Path):
        with atomic_write(location / name) as temporary:
            yield temporary
        return

    fs, path = _filesystem(location.url)
    with temporary_folder("diffusion2gan-upload") as scratch:
        temporary = scratch / name
        yield temporary
        try:
            retry_with_backoff(
                f"upload {location}/{name}", lambda: fs.put_file(str(temporary), f"{path}/{name}")
            )
        except FileNotFoundError as error:
            if not temporary.exists():
                raise
            raise UserError(
                f"{location} cannot be written: the store has no such bucket ({error}). Make the "
                "bucket or correct the URL."
            ) from error


def with_local_copy(location: Location, name: str, call: Callable[[Path], T]) -> T:
    """Returns `call(path)`, `path` being a local copy of `name`.

    Raises FileNotFoundError if there is no such file.
    """
    if isinstance(location, Path):
        return call(location / name)

    for _ in range(MAX_CACHE_MISSES):
        try:
            return call(fetch_file(location, name))
        except FileNotFoundError:
            if name not in list_names(location):
                raise
    raise Failure(
        f"{cache_folder()} is too small for the processes that share it; increase "
        "DIFFUSION2GAN_CACHE_GIB"
    )


def fetch_file(location: Remote, name: str) -> Path:
    """The path of `name` in the local cache; downloads it if it is not cached or has changed."""
    # The cached name depends on the version in the store
    fs, path = _filesystem(location.url)
    info = retry_with_backoff(f"look up {location}/{name}", lambda: fs.info(f"{path}/{name}"))
    version = f"{location.url}/{name} {info.get('ETag', info.get('mtime', ''))} {info['size']}"
    digest = hashlib.sha256(version.encode()).hexdigest()[:24]
    cached = cache_folder() / f"{digest}-{name}"
    if cached.exists():
        os.utime(cached)  # eviction removes the least recently used files
        return cached

    # Download
    with atomic_write(cached) as temporary:
        retry_with_backoff(
            f"download {location}/{name}", lambda: fs.get_file(f"{path}/{name}", str(temporary))
        )
        num_bytes = temporary.stat().st_size
        if num_bytes != info["size"]:
            raise Failure(
                f"{location}/{name}: {num_bytes} of {info['size']} bytes were received; run the "
                "same command again"
            )
    _evict(cached)
    return cached


def delete_file(location: Location, name: str) -> None:
    """Deletes `name` if it exists."""
    if isinstance(location, Path):
        (location / name).unlink(missing_ok=True)
        return
    fs, path = _filesystem(location.url)
    try:
        retry_with_backoff(f"delete {location}/{name}", lambda: fs.rm_file(f"{path}/{name}"))
    except FileNotFoundError:
        return


def cache_folder() -> Path:
    """DIFFUSION2GAN_CACHE, or a folder in the user's cache."""
    chosen = os.environ.get("DIFFUSION2GAN_CACHE")
    if chosen:
        return Path(chosen)
    user_cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(user_cache) / "diffusion2gan"


def cache_bytes() -> int:
    """The size of the cache: DIFFUSION2GAN_CACHE_GIB, 20 if it is not set."""
    return int(env_number("DIFFUSION2GAN_CACHE_GIB", DEFAULT_CACHE_GIB) * 2**30)


def _evict(newest: Path) -> None:
    """Deletes the least recently used files until the cache fits its size; never the newest."""
    files = []
    for file in newest.parent.iterdir():
        try:
            stat = file.stat()
        except FileNotFoundError:
            continue  # deleted meanwhile by another process
        files.append((stat.st_mtime, stat.st_size, file))

    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= cache_bytes():
            return
        if file != newest and not file.name.startswith("."):
            file.unlink(missing_ok=True)
            total -= size
