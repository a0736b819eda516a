"""Two-alternative forced choice on disk, in the layout of BAPPS (Zhang et al. 2018): which of two looks more like ref?

    FOLDER/<subset>/ref/NAME.png  p0/NAME.png  p1/NAME.png  judge/NAME.npy

A judgement is the share of people, in [0, 1], who found p1 the nearer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.images import SUFFIXES, read_picture, size_of
from diffusion2gan.runtime.cache import Rows


@dataclass(frozen=True)
class Triplets:
    """Triplet i is `refs[i]` and its three namesakes; it belongs to `subsets[subset[i]]`."""

    folder: Path
    subsets: list[str]
    subset: list[int]
    refs: list[Path]
    digest: str


def open_triplets(folder: Path) -> Triplets:
    """Every sub-set below `folder`. Raises UserError where there is none, or a picture or judgement is missing."""
    if not folder.is_dir():
        raise UserError(f"no folder of triplets: {folder}")
    homes = sorted(ref.parent for ref in folder.rglob("ref") if ref.is_dir())
    found = [
        (number, ref)
        for number, home in enumerate(homes)
        for ref in sorted((home / "ref").iterdir())
        if ref.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise UserError(
            f"{folder} holds no triplets: FOLDER/<subset>/ref/*.png with p0, p1 and judge/*.npy beside ref"
        )
    for _, ref in found:
        for path in (*alternatives(ref), judgement(ref)):
            if not path.is_file():
                raise UserError(
                    f"{ref} has no {path.parent.name}: {path} is missing. Add it or remove the triplet."
                )
    names = [str(home.relative_to(folder)) if home != folder else folder.name for home in homes]
    refs = [ref for _, ref in found]
    return Triplets(folder, names, [number for number, _ in found], refs, digest_of(folder, refs))


def digest_of(folder: Path, refs: list[Path]) -> str:
    """Of the pictures' names below `folder` and their sizes, and of the judgements' bytes."""
    told = hashlib.sha256()
    for ref in refs:
        for path in (ref, *alternatives(ref)):
            told.update(f"{path.relative_to(folder)}:{size_of(path)}\n".encode())
        told.update(judgement(ref).read_bytes())
    return told.hexdigest()[:16]


def alternatives(ref: Path) -> tuple[Path, Path]:
    home = ref.parent.parent
    return home / "p0" / ref.name, home / "p1" / ref.name


def judgement(ref: Path) -> Path:
    return ref.parent.parent / "judge" / f"{ref.stem}.npy"


def read_triplet(triplets: Triplets, i: int, size: int) -> Rows:
    """`ref`, `p0`, `p1` [3, size, size] uint8, `judge` and `subset` scalars.

    Raises Unreadable for a damaged picture, UserError for a judgement that is no number in [0, 1].
    """
    ref = triplets.refs[i]
    paths = {"ref": ref, "p0": alternatives(ref)[0], "p1": alternatives(ref)[1]}
    rows = {
        key: read_picture(path, str(path.relative_to(triplets.folder)), size)
        for key, path in paths.items()
    }
    return rows | {
        "judge": torch.tensor(read_judgement(judgement(ref))),
        "subset": torch.tensor(triplets.subset[i]),
    }


def read_judgement(path: Path) -> float:
    try:
        value = float(np.load(path, allow_pickle=False).reshape(()))
    except (ValueError, TypeError, EOFError) as error:
        raise UserError(
            f"the judgement {path} is not one plain number ({error}); pickles are not read."
        ) from error
    if not 0 <= value <= 1:
        raise UserError(
            f"the judgement {path} is {value}; it is the share who chose p1, from 0 to 1."
        )
    return value
