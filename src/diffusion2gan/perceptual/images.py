"""Labelled pictures: class folders, or a Hugging Face dataset on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.cache import Unreadable
from diffusion2gan.runtime.images import from_uint8

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Labelled:
    """Picture i is called `names[i]`, of class `classes[labels[i]]`; `source(i)` is its path or bytes."""

    classes: list[str]
    names: list[str]
    labels: list[int]
    source: Callable[[int], Path | bytes]
    digest: str


def open_labelled(folder: Path) -> Labelled:
    """Class folders `FOLDER/<class>/*.png`, or what `datasets.Dataset.save_to_disk` wrote.

    Raises UserError where there is neither, fewer than two classes, or a class with a single picture.
    """
    is_dataset = (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()
    found = _open_dataset(folder) if is_dataset else _open_folders(folder)
    check_classes(found.classes, found.labels, folder)
    return found


def check_classes(classes: list[str], labels: list[int], folder: Path) -> None:
    """Raises UserError unless there are two classes or more, each with a picture to train on and one to hold out."""
    if len(classes) < 2:
        raise UserError(
            f"{folder} has {len(classes)} classes of pictures, two are needed: one folder a class, FOLDER/<class>/*.png"
        )
    counts = np.bincount(labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count < 2:
            raise UserError(
                f"class {name!r} in {folder} has {count} picture that can be read; two are needed, one to train on and "
                "one to hold out. Add pictures or remove the class."
            )


def _open_folders(folder: Path) -> Labelled:
    if not folder.is_dir():
        raise UserError(f"no folder of pictures: {folder}")
    listed = {
        sub.name: sorted(p for p in sub.rglob("*") if p.suffix.lower() in SUFFIXES)
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    classes = [name for name, paths in listed.items() if paths]
    paths = [path for name in classes for path in listed[name]]
    labels = [label for label, name in enumerate(classes) for _ in listed[name]]
    names = [str(path.relative_to(folder)) for path in paths]
    told = "".join(f"{name}:{size_of(path)}\n" for name, path in zip(names, paths, strict=True))
    return Labelled(
        classes, names, labels, paths.__getitem__, hashlib.sha256(told.encode()).hexdigest()[:16]
    )


def size_of(path: Path) -> int:
    """In bytes; 0 where it cannot be told, as of a link to nowhere, which `read_picture` will name."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _open_dataset(folder: Path) -> Labelled:
    """Columns `image` and `label`; of several splits, `train`."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{folder} is a Hugging Face dataset: install `datasets` to read it, or give class folders."
        )
    import datasets

    data = datasets.load_from_disk(str(folder))
    if isinstance(data, dict):  # of splits
        if "train" not in data:
            raise UserError(
                f"the dataset in {folder} has no split 'train', but {', '.join(sorted(data))}; give the folder of one "
                f"split, {folder / min(data, default='SPLIT')}."
            )
        data = data["train"]
    missing = {"image", "label"} - set(data.features)
    if missing:
        raise UserError(
            f"the dataset in {folder} has no column {', '.join(sorted(missing))}; rename its columns."
        )
    data = data.cast_column("image", datasets.Image(decode=False))
    labels = class_numbers(data["label"], folder)
    names = getattr(data.features["label"], "names", None) or [
        str(i) for i in range(max(labels, default=-1) + 1)
    ]

    def source(i: int) -> Path | bytes:
        image = data[i]["image"]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"])

    return Labelled(
        list(names), [f"row {i}" for i in range(len(labels))], labels, source, data._fingerprint
    )


def class_numbers(column: Iterable[Any], folder: Path) -> list[int]:
    """A dataset's labels. Raises UserError at a row whose label is no class's number, or −1, which stands for none."""
    labels = []
    for row, label in enumerate(column):
        try:
            labels.append(operator.index(label))
        except TypeError as error:
            raise UserError(
                f"row {row} of the dataset in {folder} has label {label!r}, which is no class's number; number the "
                "classes, as `dataset.class_encode_column('label')` does, and save it again."
            ) from error
        if labels[-1] < 0:
            raise UserError(
                f"row {row} of the dataset in {folder} has label {labels[-1]}: no class. Keep the labelled rows, "
                "`dataset.filter(lambda row: row['label'] >= 0)`, and save it again."
            )
    return labels


def read_picture(source: Path | bytes, name: str, size: int | None = None) -> Tensor:
    """[3, size, size] uint8: the shorter side resized (Lanczos), the centre cut out; as it is where size is None.

    Raises Unreadable.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            picture = opened.convert("RGB")
    except (
        Exception
    ) as error:  # Pillow raises many kinds on damaged files: OSError, SyntaxError, struct.error, …
        raise Unreadable(f"{name} ({type(error).__name__})") from error
    if size is not None:
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = picture.resize((width, height), Image.Resampling.LANCZOS)
        picture = resized.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_images(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 → float32 in [−1, 1]."""
    return from_uint8(pictures.permute(0, 2, 3, 1).numpy())


def held_out(labels: Tensor, seed: int, share: float = 0.1) -> Tensor:
    """[N] bool: of each class the same `share`, at least one and never all, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(places))), len(places) - 1)
        mask[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return mask
