"""The checkpoints in a run's folder: the newest, some earlier ones, the best.

Each is one self-contained file. If the state is sharded over ranks, the file names a folder beside
it, `parts-…`, with the shards of each rank (`runtime/sharded_checkpoint`). Such a folder belongs to
the run once a checkpoint names it, and is removed when no checkpoint names it any more.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write, flush_folder

CHECKPOINT = "checkpoint.safetensors"  # the newest, from which the run resumes
BEST = "checkpoint-best.safetensors"
NUMBERED = "checkpoint-[0-9]*.safetensors"
SHARD_FOLDERS = "parts-[0-9]*"


def read_meta(path: Path) -> dict[str, Any]:
    """The header of a checkpoint. Raises Failure if it is damaged."""
    meta = checkpoint.meta(path)
    checkpoint.check_counts(path, meta, "pairs_seen")
    return meta


def write(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], recipe: Recipe) -> None:
    """Writes the newest checkpoint atomically; keeps earlier ones as the recipe specifies."""
    checkpoint.save(folder / CHECKPOINT, tensors, meta)
    keep(folder, recipe)


def unfinished_shards(folder: Path, pairs_seen: int) -> Path:
    """The folder to which ranks write their shards.

    It is named like a temporary file of CHECKPOINT, so that the next process that locks CHECKPOINT
    removes the folder if the writer was killed.
    """
    return folder / f".{CHECKPOINT}.{pairs_seen:09d}.tmp"


def write_sharded(
    folder: Path,
    files: dict[str, int],
    digests: dict[str, str],
    meta: dict[str, Any],
    recipe: Recipe,
) -> None:
    """As `write`, for shards that all ranks have written to `unfinished_shards`.

    `files`: the names and sizes in bytes of the shard files. `digests`: their names and sha256.
    """
    # A resumed run may save again at the same progress, while the earlier folder is still in use
    pairs_seen = meta["pairs_seen"]
    number = 0
    while (folder / f"parts-{pairs_seen:09d}-{number}").exists():
        number += 1
    name = f"parts-{pairs_seen:09d}-{number}"

    unfinished = unfinished_shards(folder, pairs_seen)
    flush_folder(unfinished)
    os.replace(unfinished, folder / name)
    parts = {"folder": name, "files": files, "sha256": digests}
    write(folder, {}, {**meta, "parts": parts}, recipe)


def keep(folder: Path, recipe: Recipe) -> None:
    """Links the newest checkpoint to its other names, and removes old ones. Idempotent.

    The names are hard links, which need no space. The best checkpoint is the one with the lowest
    running average of `loss`, the distance to the teacher.
    """
    newest = folder / CHECKPOINT
    meta = read_meta(newest)

    # 1. By number of pairs
    if recipe.keep_checkpoints > 1:
        link(newest, folder / f"checkpoint-{meta['pairs_seen']:09d}.safetensors")

    # 2. The best
    best = folder / BEST
    if recipe.keep_best:
        best_loss = average_loss(checkpoint.meta(best)) if best.exists() else math.inf
        if average_loss(meta) < best_loss:
            link(newest, best)

    # 3. Remove old ones. Those with more pairs than the newest are kept: the user has restored an
    # earlier checkpoint, and the run will overwrite them.
    num_kept = recipe.keep_checkpoints if recipe.keep_checkpoints > 1 else 0
    numbered = []
    for path in sorted(folder.glob(NUMBERED)):
        if pairs_seen_from_name(path) <= meta["pairs_seen"]:
            numbered.append(path)
    num_removed = max(0, len(numbered) - num_kept)
    for path in numbered[:num_removed]:
        path.unlink()

    # 4. Remove shards that no checkpoint names any more
    shard_folders = list(folder.glob(SHARD_FOLDERS))
    if not shard_folders:
        return
    named = set()
    for path in folder.glob("*.safetensors"):
        named.add(checkpoint.meta(path).get("parts", {}).get("folder"))
    for path in shard_folders:
        if path.name not in named:
            shutil.rmtree(path)


def average_loss(meta: dict[str, Any]) -> float:
    """The running average of the distance when the checkpoint was written; infinite if unknown."""
    return float(meta.get("health", {}).get("average", {}).get("loss", math.inf))


def pairs_seen_from_name(path: Path) -> int:
    """`checkpoint-000000012.safetensors` → 12."""
    return int(path.stem.removeprefix("checkpoint-"))


def link(newest: Path, path: Path) -> None:
    """Hard-links `path` to `newest`, atomically; copies it if the disk has no hard links."""
    if path.exists() and path.samefile(newest):
        return
    with atomic_write(path) as temporary:
        try:
            os.link(newest, temporary)
        except OSError:
            shutil.copyfile(newest, temporary)


def names(folder: Path) -> list[str]:
    """The names of all checkpoints in a run's folder."""
    return sorted(path.name for path in folder.glob("checkpoint*.safetensors"))


def find(run: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint file) of a run's folder or of one of its checkpoints.

    A folder means its newest checkpoint. Raises UserError if there is no run or no such checkpoint.
    """
    if run.suffix == ".safetensors":
        folder, file = run.parent, run
    else:
        folder, file = run, run / CHECKPOINT

    if not (folder / "recipe.json").is_file():
        raise UserError(
            f"{folder} contains no run (recipe.json is missing); create one with diffusion2gan "
            "distill."
        )
    if not file.is_file():
        existing = names(folder)
        if existing:
            raise UserError(f"{folder} has no {file.name}; it has {', '.join(existing)}")
        raise UserError(
            f"{folder} has no checkpoint yet; run its distill command until the first one is "
            "written."
        )
    return folder, file


def check_missing_files(folder: Path) -> None:
    """Raises UserError if the folder has checkpoints, but lacks recipe.json or the newest one."""
    existing = names(folder)
    if not existing:
        return
    if not (folder / "recipe.json").is_file():
        raise UserError(
            f"{folder} has {', '.join(existing)} but no recipe.json, so the settings of their run "
            "are unknown. Put recipe.json back, or choose another --out."
        )
    if CHECKPOINT not in existing:
        numbered = sorted(folder.glob(NUMBERED))
        last = numbered[-1] if numbered else folder / BEST
        raise UserError(
            f"{folder} lacks {CHECKPOINT}, its newest checkpoint. To resume from an earlier "
            f"one: mv {last} {folder / CHECKPOINT}; to start a new run, choose another --out."
        )
