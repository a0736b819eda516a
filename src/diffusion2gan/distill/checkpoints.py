"""The checkpoints of a run's folder: the newest, some before it, the best. Each is one whole file, enough by itself.

Of a state that is cut over ranks the file names a folder beside it, `parts-…`, with each rank's part (`runtime/parts`).
Parts count from the moment a file names them, and go when none does.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write

CHECKPOINT = "checkpoint.safetensors"  # the newest: where the run goes on
BEST = "checkpoint-best.safetensors"
NUMBERED = "checkpoint-[0-9]*.safetensors"
PARTS = "parts-[0-9]*"


def write(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], recipe: Recipe) -> None:
    """Makes it the newest, whole or not at all, and keeps what the recipe says."""
    checkpoint.save(folder / CHECKPOINT, tensors, meta)
    keep(folder, recipe)


def unfinished(folder: Path, pairs_seen: int) -> Path:
    """Where ranks write their parts: swept, like every temporary of CHECKPOINT, by who next claims that."""
    return folder / f".{CHECKPOINT}.{pairs_seen:09d}.tmp"


def write_parts(folder: Path, files: dict[str, int], meta: dict[str, Any], recipe: Recipe) -> None:
    """As `write`, of the parts that all ranks have written in `unfinished`."""
    seen = meta["pairs_seen"]
    names = (f"parts-{seen:09d}-{number}" for number in itertools.count())
    name = next(name for name in names if not (folder / name).exists())
    os.replace(unfinished(folder, seen), folder / name)
    write(folder, {}, meta | {"parts": {"folder": name, "files": files}}, recipe)


def keep(folder: Path, recipe: Recipe) -> None:
    """Gives the newest its further names, and removes what is too old. Once more changes nothing.

    Names are links: they take no room. The best has the lowest running average of `loss`, the distance to the teacher.
    """
    newest, meta = folder / CHECKPOINT, checkpoint.meta(folder / CHECKPOINT)
    if recipe.keep_checkpoints > 1:
        link(newest, folder / f"checkpoint-{meta['pairs_seen']:09d}.safetensors")
    best = folder / BEST
    if recipe.keep_best and loss_of(meta) < (
        loss_of(checkpoint.meta(best)) if best.exists() else math.inf
    ):
        link(newest, best)
    kept = recipe.keep_checkpoints if recipe.keep_checkpoints > 1 else 0
    before = [
        path for path in sorted(folder.glob(NUMBERED)) if number_of(path) <= meta["pairs_seen"]
    ]
    for path in before[: max(0, len(before) - kept)]:
        path.unlink()
    if there := list(folder.glob(PARTS)):
        named = {
            checkpoint.meta(path).get("parts", {}).get("folder")
            for path in folder.glob("*.safetensors")
        }
        for path in there:
            if path.name not in named:
                shutil.rmtree(path)


def loss_of(meta: dict[str, Any]) -> float:
    """The running average of the distance when it was written; infinite where none is known."""
    return float(meta.get("health", {}).get("average", {}).get("loss", math.inf))


def number_of(path: Path) -> int:
    """Pairs seen, by the name of one that is kept."""
    return int(path.stem.removeprefix("checkpoint-"))


def link(newest: Path, path: Path) -> None:
    """The same file under another name, which names the old one until then; a copy where the disk has no links."""
    if path.exists() and path.samefile(newest):
        return
    with atomic_write(path) as temporary:
        try:
            os.link(newest, temporary)
        except OSError:
            shutil.copyfile(newest, temporary)


def find(run: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint file) of a run's folder, which means its newest, or of one of its checkpoints.

    Raises UserError where there is no run or no such checkpoint.
    """
    folder, file = (run.parent, run) if run.suffix == ".safetensors" else (run, run / CHECKPOINT)
    if not (folder / "recipe.json").is_file():
        raise UserError(
            f"{folder} holds no run (recipe.json is missing); make one with diffusion2gan distill"
        )
    if not file.is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("checkpoint*.safetensors")))
        if there:
            raise UserError(f"{folder} has no {file.name}; it has {there}")
        raise UserError(
            f"{folder} has no checkpoint yet; run its distill command until the first one is written"
        )
    return folder, file


def check_lost(folder: Path) -> None:
    """Raises UserError where a file of the run is missing that its checkpoints say was there."""
    there = sorted(path.name for path in folder.glob("checkpoint*.safetensors"))
    if there and not (folder / "recipe.json").is_file():
        raise UserError(
            f"{folder} has {', '.join(there)} but no recipe.json, so nobody knows of which run they are. Put it "
            "back, or choose another --out."
        )
    if there and CHECKPOINT not in there:
        last = sorted(folder.glob(NUMBERED))[-1:] or [folder / BEST]
        raise UserError(
            f"{folder} has lost {CHECKPOINT}, its newest. To go on from an earlier one: mv {last[0]} "
            f"{folder / CHECKPOINT}; to begin anew, choose another --out."
        )
