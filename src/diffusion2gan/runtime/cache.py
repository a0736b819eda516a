"""Tensors made once from many files, in chunks on disk: each whole or absent, so that an interrupted job goes on."""

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
    """A file that cannot be used: its name and why."""


@dataclass(frozen=True)
class Cache:
    """`rows[name]` is a list of chunks, read from disk as they are touched; `unreadable` names what was skipped."""

    rows: dict[str, list[Tensor]]
    unreadable: list[str]

    def __len__(self) -> int:
        return sum(map(len, next(iter(self.rows.values()))))

    def whole(self, name: str) -> Tensor:
        """[N, …] in memory."""
        return torch.cat(self.rows[name])

    def take(self, name: str, places: list[int]) -> Tensor:
        """[len(places), …], without reading the rest."""
        chunks = self.rows[name]
        ends = torch.tensor([0, *map(len, chunks)]).cumsum(0)
        found = []
        for place in places:
            chunk = int(torch.searchsorted(ends, place, right=True)) - 1
            found.append(chunks[chunk][place - int(ends[chunk])])
        return torch.stack(found)


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
    """Reads `count` things into `folder`: `read(i)` one by one, `finish` on batches of them (a network's turn).

    `spec` says what the cache is made of. A thing for which `read` raises Unreadable is skipped and named. The ranks of
    `group` take the chunks in turn and wait for each other. Raises UserError where the folder holds another cache, not
    all ranks see it, or more than 1 % are unreadable (at once where one rank alone finds so many).
    """
    group = group or Group(Ranks())
    if group.ranks.is_main:
        ensure_settings(folder / "cache.json", spec)
    group.all_gather_string(f"claimed {what}", "")
    if not (folder / "cache.json").exists():
        raise UserError(
            f"{folder} of rank 0 is not there on rank {group.ranks.rank}. All ranks must see one --out."
        )
    parts = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    paths = [folder / f"{numbers.start:08d}.safetensors" for numbers in parts]
    unreadable: list[str] = []
    with stop_signal() as stopped, Bar(what, count) as bar:
        for place, (numbers, path) in enumerate(zip(parts, paths, strict=True)):
            if stopped():
                raise KeyboardInterrupt
            if place % group.ranks.world_size == group.ranks.rank:
                if path.exists():
                    unreadable += checkpoint.meta(path)["unreadable"]
                else:
                    rows, names = _read_chunk(numbers, read, finish, batch)
                    unreadable += names
                    _check_share(unreadable, count, what, folder)
                    checkpoint.save(path, rows, {"unreadable": names})
            bar.advance(len(numbers))
        if stopped():
            raise KeyboardInterrupt
    group.all_gather_string(f"made {what}", "")
    made = [checkpoint.load(path) for path in paths]
    chunks, unreadable = (
        [rows for rows, _ in made if rows],
        [name for _, meta in made for name in meta["unreadable"]],
    )
    _check_share(unreadable, count, what, folder)
    if unreadable:
        console.print(
            f"skipped {len(unreadable)} of {count} {what}: {_some(unreadable)}", soft_wrap=True
        )
    return Cache({name: [rows[name] for rows in chunks] for name in chunks[0]}, unreadable)


def _read_chunk(
    numbers: range, read: Callable[[int], Rows], finish: Callable[[Rows], Rows], batch: int
) -> tuple[Rows, list[str]]:
    """(the rows of all readable numbers, the names of the others)."""
    done: list[Rows] = []
    names: list[str] = []
    for start in range(numbers.start, numbers.stop, batch):
        group: list[Rows] = []
        for i in range(start, min(start + batch, numbers.stop)):
            try:
                group.append(read(i))
            except Unreadable as error:
                names.append(str(error))
        if group:
            done.append(finish({key: torch.stack([row[key] for row in group]) for key in group[0]}))
    return (
        {key: torch.cat([rows[key] for rows in done]) for key in done[0]} if done else {}
    ), names


def ensure_settings(path: Path, spec: dict[str, Any]) -> None:
    """Writes `spec`, what a folder's contents are made with. Raises UserError where `path` says something else."""
    if not path.exists():
        write_json(path, spec)
        return
    there = read_json(path)
    for key, value in spec.items():
        if there.get(key) != value:
            raise UserError(
                f"{path.parent} was made with {key} = {there.get(key)!r}, this command says {value!r}; choose another "
                "--out, or delete that folder."
            )


def _check_share(unreadable: list[str], count: int, what: str, folder: Path) -> None:
    if len(unreadable) > MAX_UNREADABLE * count:
        raise UserError(
            f"{len(unreadable)} of {count} {what} cannot be read, more than {MAX_UNREADABLE:.0%}: {_some(unreadable)}. "
            f"Mend or remove them, delete {folder} and run the same command again."
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
