"""Two-alternative forced choices on disk, in the layout of BAPPS (Zhang et al. 2018, section 4).

Which of two distorted images, p0 or p1, looks more like the reference?

    FOLDER/<subset>/ref/NAME.png  p0/NAME.png  p1/NAME.png  judge/NAME.npy

A judgement is the share of people, in [0, 1], who found p1 more similar.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.images import SUFFIXES, file_size, read_image
from diffusion2gan.runtime.cache import Rows
from diffusion2gan.runtime.files import is_hidden


@dataclass(frozen=True)
class Triplets:
    """Triplet i is `refs[i]` and the files of that name beside it.

    It belongs to `subsets[subset[i]]`. `digest` identifies the set.
    """

    folder: Path
    subsets: list[str]
    subset: list[int]
    refs: list[Path]
    digest: str


def open_triplets(folder: Path) -> Triplets:
    """Finds every subset below `folder`.

    Raises UserError if there is none, or an image or judgement is missing.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of triplets: {folder}")

    # Find the reference images of each subset
    subset_folders = sorted(ref.parent for ref in folder.rglob("ref") if ref.is_dir())
    subset: list[int] = []
    refs: list[Path] = []
    for number, subset_folder in enumerate(subset_folders):
        for path in sorted((subset_folder / "ref").iterdir()):
            if path.suffix.lower() in SUFFIXES and not is_hidden(path):
                subset.append(number)
                refs.append(path)
    if not refs:
        raise UserError(
            f"{folder} contains no triplets: FOLDER/<subset>/ref/*.png "
            "with p0, p1 and judge/*.npy beside ref"
        )

    # Check that the other files of each triplet exist
    for ref in refs:
        for path in (*distorted_paths(ref), judgement_path(ref)):
            if not path.is_file():
                raise UserError(
                    f"{ref} has no {path.parent.name}: {path} is missing. "
                    "Add it or remove the triplet."
                )

    names = []
    for subset_folder in subset_folders:
        is_root = subset_folder == folder
        names.append(folder.name if is_root else str(subset_folder.relative_to(folder)))
    return Triplets(folder, names, subset, refs, compute_digest(folder, refs))


def compute_digest(folder: Path, refs: list[Path]) -> str:
    """Hash of the images' names below `folder` and their sizes, and of the judgements' bytes."""
    digest = hashlib.sha256()
    for ref in refs:
        for path in (ref, *distorted_paths(ref)):
            line = f"{path.relative_to(folder)}:{file_size(path)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(judgement_path(ref).read_bytes())
    return digest.hexdigest()[:16]


def distorted_paths(ref: Path) -> tuple[Path, Path]:
    """The paths of p0 and p1 of the triplet with this reference."""
    subset_folder = ref.parent.parent
    return subset_folder / "p0" / ref.name, subset_folder / "p1" / ref.name


def judgement_path(ref: Path) -> Path:
    """The path of the judgement of the triplet with this reference."""
    return ref.parent.parent / "judge" / f"{ref.stem}.npy"


def read_triplet(triplets: Triplets, i: int, size: int) -> Rows:
    """Triplet i: `ref`, `p0`, `p1` [3, size, size] uint8, `judge` and `subset` scalars.

    Raises Unreadable for a damaged image, UserError for a judgement that is not a number in [0, 1].
    """
    ref = triplets.refs[i]
    p0, p1 = distorted_paths(ref)
    rows: Rows = {}
    for key, path in (("ref", ref), ("p0", p0), ("p1", p1)):
        rows[key] = read_image(path, str(path.relative_to(triplets.folder)), size)
    rows["judge"] = torch.tensor(read_judgement(judgement_path(ref)))
    rows["subset"] = torch.tensor(triplets.subset[i])
    return rows


def read_judgement(path: Path) -> float:
    """The share of people who chose p1. Raises UserError unless the file is a number in [0, 1]."""
    try:
        value = float(np.load(path, allow_pickle=False).reshape(()))
    except Exception as error:
        # For damaged files numpy raises many kinds: TokenError, MemoryError, BadZipFile, …
        raise UserError(
            f"the judgement {path} is not one plain number ({error}); pickles are not read."
        ) from error
    if not 0 <= value <= 1:
        raise UserError(
            f"the judgement {path} is {value}; it must be the share who chose p1, from 0 to 1."
        )
    return value
