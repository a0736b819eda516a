"""Tensors computed once from many files and stored in chunks. An interrupted job continues.

Each chunk is one file, written atomically.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import Group, Ranks
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.runtime.progress import Bar, console
from diffusion2gan.runtime.stop import stop_signal

MAX_UNREADABLE = 0.01  # share of the files

Rows = dict[str, Tensor]


class Unreadable(Exception):
    """A file that cannot be used: its name and the reason."""


@dataclass(frozen=True)
class Cache:
    """`chunks[name]`: tensors [n, …], read from disk when they are used.

    `unreadable`: the names of the files that were skipped.
    """

    chunks: dict[str, list[Tensor]]
    unreadable: list[str]

    def __len__(self) -> int:
        return sum(map(len, next(iter(self.chunks.values()))))

    def load_all(self, name: str) -> Tensor:
        """[N, …] in memory."""
        return torch.cat(self.chunks[name])

    def load_rows(self, name: str, rows: list[int]) -> Tensor:
        """[len(rows), …], without reading any other row."""
        chunks = self.chunks[name]
        starts = torch.tensor([0, *map(len, chunks)]).cumsum(0)
        found = []
        for row in rows:
            chunk = int(torch.searchsorted(starts, row, right=True)) - 1
            found.append(chunks[chunk][row - int(starts[chunk])])
        return torch.stack(found)


def load_or_compute(
    path: Path, meta: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors in `path`, if it was written with this `meta`.

    Otherwise `compute()` makes them and they are written there, with `meta`. Raises Failure if the
    file is damaged.
    """
    if path.exists():
        tensors, existing = checkpoint.load(path)
        if existing == meta:
            return tensors

    tensors = compute()
    checkpoint.save(path, tensors, meta)
    return tensors


def make_cache(
    folder: Path,
    spec: dict[str, Any],
    count: int,
    read: Callable[[int], Rows],
    finish: Callable[[Rows], Rows],
    what: str,
    chunk: int = 1024,
    batch: int = 32,
    group: Group | None = None,
) -> Cache:
    """Computes the rows of `count` items into `folder`, in files of `chunk` items.

    `read(i)` is called for each item and `finish` for each batch of the results, such as a
    network's forward pass. An item for which `read` raises Unreadable is skipped and reported.
    `spec` describes what the cache is computed from, `what` names the items in messages. The ranks
    of `group` share the chunks and wait for each other.

    Raises UserError if the folder contains a cache with another `spec`, if not all ranks use the
    same folder, or if more than 1 % of the items are unreadable (at once if one rank finds that
    many).
    """
    group = group or Group(Ranks())
    ranks = group.ranks

    # Describe the cache, or check the existing description
    if ranks.is_main:
        ensure_settings(folder / "cache.json", spec)
    group.all_gather_string(f"described {what} in {folder}", "")
    if not (folder / "cache.json").exists():
        raise UserError(
            f"{folder} of rank 0 does not exist on rank {ranks.rank}. All ranks must use the same "
            "--out, on a shared disk."
        )

    # Compute this rank's chunks
    chunks = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    paths = [folder / f"{numbers.start:08d}.safetensors" for numbers in chunks]
    unreadable: list[str] = []
    with stop_signal() as stopped, Bar(what, count) as bar:
        for index, (numbers, path) in enumerate(zip(chunks, paths, strict=True)):
            if stopped():
                raise KeyboardInterrupt
            if index % ranks.world_size == ranks.rank:
                if path.exists():
                    unreadable += checkpoint.meta(path)["unreadable"]
                else:
                    rows, skipped = _compute_chunk(numbers, read, finish, batch)
                    unreadable += skipped
                    _check_num_unreadable(unreadable, count, what, folder)
                    checkpoint.save(path, rows, {"unreadable": skipped})
            bar.advance(len(numbers))
        if stopped():
            raise KeyboardInterrupt
    group.all_gather_string(f"made {what} in {folder}", "")

    # Open the chunks of all ranks
    loaded: list[Rows] = []
    unreadable = []
    for path in paths:
        rows, meta = checkpoint.load(path)
        unreadable += meta["unreadable"]
        if rows:
            loaded.append(rows)
    _check_num_unreadable(unreadable, count, what, folder)
    if unreadable:
        names = _first_names(unreadable)
        console.print(f"skipped {len(unreadable)} of {count} {what}: {names}", soft_wrap=True)
    return Cache({name: [rows[name] for rows in loaded] for name in loaded[0]}, unreadable)


def _compute_chunk(
    numbers: range, read: Callable[[int], Rows], finish: Callable[[Rows], Rows], batch: int
) -> tuple[Rows, list[str]]:
    """Returns (the rows of the readable items, the names of the others)."""
    finished: list[Rows] = []
    skipped: list[str] = []
    for start in range(numbers.start, numbers.stop, batch):
        # Read a batch
        items: list[Rows] = []
        for i in range(start, min(start + batch, numbers.stop)):
            try:
                items.append(read(i))
            except Unreadable as error:
                skipped.append(str(error))

        if items:
            stacked = {key: torch.stack([item[key] for item in items]) for key in items[0]}
            finished.append(finish(stacked))

    if not finished:
        return {}, skipped
    return {key: torch.cat([rows[key] for rows in finished]) for key in finished[0]}, skipped


def ensure_settings(path: Path, spec: dict[str, Any]) -> None:
    """Writes `spec`, the settings of a folder's contents, to `path`.

    Raises UserError if `path` exists and has other settings.
    """
    if not path.exists():
        write_json(path, spec)
        return
    existing = read_json(path)
    if not isinstance(existing, dict):
        raise UserError(f"{path} contains no settings; restore it, or choose another --out.")
    for key, value in spec.items():
        if existing.get(key) != value:
            raise UserError(
                f"{path.parent} was made with {key} = {existing.get(key)!r}, but this command has "
                f"{value!r}. To continue it, use the same setting; to start anew, choose another "
                "--out, or move that folder away."
            )


def _check_num_unreadable(unreadable: list[str], count: int, what: str, folder: Path) -> None:
    if len(unreadable) > MAX_UNREADABLE * count:
        raise UserError(
            f"{len(unreadable)} of {count} {what} cannot be read, more than {MAX_UNREADABLE:.0%}: "
            f"{_first_names(unreadable)}. Repair or remove them, move {folder} away and run the "
            "same command again."
        )


def _first_names(names: list[str], limit: int = 5) -> str:
    text = ", ".join(names[:limit])
    if len(names) > limit:
        text += f" and {len(names) - limit} more"
    return text
