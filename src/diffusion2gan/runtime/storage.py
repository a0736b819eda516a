"""Where files lie: a folder, or a URL of an object store through fsspec. Whole or not at all in both.

A store's files are fetched into a bounded local cache and written by way of a local scratch file. Faults of the
network are waited out, with growing pauses, for `PATIENCE_S` seconds; then they are a `Failure`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime.environment import env_number
from diffusion2gan.runtime.files import atomic_write
from diffusion2gan.runtime.progress import console

T = TypeVar("T")
PATIENCE_S = env_number("DIFFUSION2GAN_PATIENCE_S", 60)  # how long a store may be out of reach
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0
OWN_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
)  # no fault of a store, and no wait mends it


@dataclass(frozen=True)
class Remote:
    """A prefix in an object store, as `s3://bucket/set`."""

    url: str

    def __str__(self) -> str:
        return self.url


Location = Path | Remote


@dataclass(frozen=True)
class Entry:
    """What a listing tells of a file. `modified_s`: seconds since 1970, by the disk's or store's clock."""

    num_bytes: int
    modified_s: float


def parse_location(text: str | Path) -> Location:
    """A path, or a URL whose filesystem is installed. Raises UserError where it is not."""
    if "://" not in str(text):
        return Path(text)
    remote = Remote(str(text).rstrip("/"))
    _filesystem(remote.url)
    return remote


@lru_cache(maxsize=8)
def _filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's filesystem, the path in it); what it lists is never remembered: other processes write too."""
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
    """`call()`, again after growing pauses while the store is at fault. Raises Failure after PATIENCE_S seconds.

    What the store does not have, and what this machine's disk does not take, is raised at once as it came.
    """
    start, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OWN_DISK:
                raise
            told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is said'}"
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                raise UserError(
                    f"{what}: the store refuses ({told}). Set its credentials, as AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and check the bucket's name and rights."
                ) from error
            if time.monotonic() - start + pause > PATIENCE_S:
                raise Failure(
                    f"{what}: the store was out of reach for {PATIENCE_S:.0f} s ({told}). Nothing half-written is "
                    "left; run the same command to continue."
                ) from error
            console.print(f"{what}: {told}; again in {pause:.2g} s", soft_wrap=True)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def list_files(place: Location) -> dict[str, Entry]:
    """The files directly in `place`, by name; none where there is no such folder."""
    if isinstance(place, Path):
        if not place.is_dir():
            return {}
        with os.scandir(place) as found:
            stats = {
                entry.name: entry.stat()
                for entry in found
                if not entry.name.startswith(".") and entry.is_file()
            }
        return {name: Entry(stat.st_size, stat.st_mtime) for name, stat in stats.items()}
    fs, path = _filesystem(place.url)
    try:
        rows = retry_with_backoff(f"list {place}", lambda: fs.ls(path, detail=True, refresh=True))
    except FileNotFoundError:
        return {}
    return {
        row["name"].rsplit("/", 1)[-1]: Entry(int(row["size"]), _modified(row))
        for row in rows
        if row["type"] == "file"
    }


def list_names(place: Location) -> set[str]:
    """The names of `listing`, without a look at each file."""
    if not isinstance(place, Path):
        return set(list_files(place))
    return (
        {name for name in os.listdir(place) if not name.startswith(".")}
        if place.is_dir()
        else set()
    )


def _modified(row: dict[str, Any]) -> float:
    when = row.get("LastModified", row.get("mtime", row.get("created", 0.0)))
    return float(when.timestamp() if hasattr(when, "timestamp") else when)


@contextmanager
def atomic_put(place: Location, name: str) -> Iterator[Path]:
    """Yields a local temporary; when the block succeeds it becomes `name` in `place`, whole or not at all.

    Raises UserError where the store has no such bucket.
    """
    if isinstance(place, Path):
        with atomic_write(place / name) as temporary:
            yield temporary
        return
    fs, path = _filesystem(place.url)
    with tempfile.TemporaryDirectory(prefix="diffusion2gan-") as scratch:
        temporary = Path(scratch) / name
        yield temporary
        try:
            retry_with_backoff(
                f"upload {place}/{name}", lambda: fs.put_file(str(temporary), f"{path}/{name}")
            )
        except FileNotFoundError as error:
            if not temporary.exists():
                raise
            raise UserError(
                f"{place} cannot be written: no such place in the store ({error}). Make the bucket or mend the URL."
            ) from error


def with_local_copy(place: Location, name: str, call: Callable[[Path], T]) -> T:
    """`call(path)` on `name` as a local file. Raises FileNotFoundError where there is none."""
    if isinstance(place, Path):
        return call(place / name)
    for _ in range(8):  # another process may clear the cache between fetching and opening
        try:
            return call(fetch_file(place, name))
        except FileNotFoundError:
            if name not in list_names(place):
                raise
    raise Failure(
        f"{cache_folder()} is too small for the processes that share it; raise DIFFUSION2GAN_CACHE_GIB"
    )


def fetch_file(place: Remote, name: str) -> Path:
    """`name` in the local cache, fetched where it is not there or has changed in the store."""
    fs, path = _filesystem(place.url)
    info = retry_with_backoff(f"look at {place}/{name}", lambda: fs.info(f"{path}/{name}"))
    version = f"{place.url}/{name} {info.get('ETag', info.get('mtime', ''))} {info['size']}"
    cached = cache_folder() / f"{hashlib.sha256(version.encode()).hexdigest()[:24]}-{name}"
    if cached.exists():
        os.utime(cached)  # the newest use is kept longest
        return cached
    with atomic_write(cached) as temporary:
        retry_with_backoff(
            f"fetch {place}/{name}", lambda: fs.get_file(f"{path}/{name}", str(temporary))
        )
        if temporary.stat().st_size != info["size"]:
            raise Failure(
                f"{place}/{name} came as {temporary.stat().st_size} of {info['size']} bytes; try again"
            )
    _shrink(cached)
    return cached


def delete_file(place: Location, name: str) -> None:
    """Deletes `name`, if it is there."""
    if isinstance(place, Path):
        (place / name).unlink(missing_ok=True)
        return
    fs, path = _filesystem(place.url)
    try:
        retry_with_backoff(f"delete {place}/{name}", lambda: fs.rm_file(f"{path}/{name}"))
    except FileNotFoundError:
        return


def cache_folder() -> Path:
    """DIFFUSION2GAN_CACHE, or a folder in the user's cache."""
    base = os.environ.get("DIFFUSION2GAN_CACHE")
    return (
        Path(base)
        if base
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusion2gan"
    )


def cache_bytes() -> int:
    """DIFFUSION2GAN_CACHE_GIB, 20 if not given: how much of a store's files is kept."""
    return int(env_number("DIFFUSION2GAN_CACHE_GIB", 20) * 2**30)


def _shrink(newest: Path) -> None:
    """Deletes the least recently used files of the cache until it fits; never the newest."""
    files = []
    for file in newest.parent.iterdir():
        try:
            files.append((file.stat().st_mtime, file.stat().st_size, file))
        except FileNotFoundError:
            continue  # another process was quicker
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= cache_bytes():
            return
        if file != newest and not file.name.startswith("."):
            file.unlink(missing_ok=True)
            total -= size
