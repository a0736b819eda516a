"""Labelled images: class folders, or a Hugging Face dataset on disk."""

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
from diffusion2gan.runtime.files import walk_files
from diffusion2gan.runtime.images import BadImage, from_uint8, read_rgb

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class LabelledImages:
    """A set of images, not decoded yet. Image i is `names[i]`, of class `classes[labels[i]]`.

    `source(i)` is its path or its bytes. `digest` identifies the set.
    """

    classes: list[str]
    names: list[str]
    labels: list[int]
    source: Callable[[int], Path | bytes]
    digest: str


def open_labelled_images(folder: Path) -> LabelledImages:
    """Opens class folders `FOLDER/<class>/*.png`, or a folder from `Dataset.save_to_disk`.

    Raises UserError if there is neither, fewer than two classes, or a class with a single image.
    """
    is_dataset = (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()
    found = _open_dataset(folder) if is_dataset else _open_folders(folder)
    check_classes(found.classes, found.labels, folder)
    return found


def check_classes(classes: list[str], labels: list[int], folder: Path) -> None:
    """Raises UserError unless there are at least two classes with at least two images each.

    Of each class one image is needed to train on and one to hold out.
    """
    if len(classes) < 2:
        raise UserError(
            f"{folder} has {len(classes)} classes of images, at least two are needed: "
            "one folder per class, FOLDER/<class>/*.png"
        )

    counts = np.bincount(labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        if count < 2:
            raise UserError(
                f"class {name!r} in {folder} has {count} readable image; two are needed, one to "
                "train on and one to hold out. Add images or remove the class."
            )


def _open_folders(folder: Path) -> LabelledImages:
    """Every non-hidden folder that contains images is a class, in alphabetical order."""
    if not folder.is_dir():
        raise UserError(f"no folder of images: {folder}")

    classes: list[str] = []
    labels: list[int] = []
    paths: list[Path] = []
    for class_folder in sorted(folder.iterdir()):
        if not class_folder.is_dir() or class_folder.name.startswith("."):
            continue
        files = _find_images(class_folder)
        if files:
            labels += [len(classes)] * len(files)
            classes.append(class_folder.name)
            paths += files
    names = [str(path.relative_to(folder)) for path in paths]

    # The set is identified by its files' names and sizes.
    digest = hashlib.sha256()
    for name, path in zip(names, paths, strict=True):
        digest.update(f"{name}:{file_size(path)}\n".encode("utf-8", "surrogateescape"))
    return LabelledImages(classes, names, labels, paths.__getitem__, digest.hexdigest()[:16])


def _find_images(class_folder: Path) -> list[Path]:
    """All image files below a folder, sorted, without hidden ones.

    Raises UserError if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}), so the images of class "
            f"{class_folder.name!r} are not known. Make it readable, or move it out of "
            f"{class_folder.parent}."
        ) from error

    files = walk_files(class_folder, onerror=refuse)
    return [path for path in files if path.suffix.lower() in SUFFIXES]


def file_size(path: Path) -> int:
    """The file's size in bytes; 0 if it cannot be read, as for a broken link.

    `read_image` reports such a file by name.
    """
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _open_dataset(folder: Path) -> LabelledImages:
    """A Hugging Face dataset with columns `image` and `label`; of several splits, `train`."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{folder} is a Hugging Face dataset: install `datasets` to read it, "
            "or use class folders."
        )
    import datasets

    # The split
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, dict):
        if "train" not in data:
            raise UserError(
                f"the dataset in {folder} has no split 'train', but {', '.join(sorted(data))}; "
                f"give the folder of one split, {folder / min(data, default='SPLIT')}."
            )
        data = data["train"]

    # The columns
    missing = {"image", "label"} - set(data.features)
    if missing:
        raise UserError(
            f"the dataset in {folder} has no column {', '.join(sorted(missing))}; "
            "rename its columns."
        )
    data = data.cast_column("image", datasets.Image(decode=False))
    labels = read_labels(data["label"], folder)

    # A column of plain integers has no class names: use the numbers.
    classes = getattr(data.features["label"], "names", None)
    if not classes:
        classes = [str(number) for number in range(max(labels, default=-1) + 1)]

    def source(i: int) -> Path | bytes:
        image = data[i]["image"]
        if image["bytes"] is not None:
            return image["bytes"]
        return Path(image["path"])

    names = [f"row {i}" for i in range(len(labels))]
    return LabelledImages(list(classes), names, labels, source, data._fingerprint)


def read_labels(column: Iterable[Any], folder: Path) -> list[int]:
    """The labels of a dataset as integers.

    Raises UserError for a label that is not an integer, or is negative: −1 stands for no class.
    """
    labels = []
    for row, label in enumerate(column):
        try:
            number = operator.index(label)
        except TypeError as error:
            raise UserError(
                f"row {row} of the dataset in {folder} has label {label!r}, which is not a class "
                "number; number the classes, as `dataset.class_encode_column('label')` does, "
                "and save it again."
            ) from error
        if number < 0:
            raise UserError(
                f"row {row} of the dataset in {folder} has label {number}, which means no class. "
                "Keep the labelled rows, `dataset.filter(lambda row: row['label'] >= 0)`, "
                "and save it again."
            )
        labels.append(number)
    return labels


def read_image(source: Path | bytes, name: str, size: int | None = None) -> Tensor:
    """[3, size, size] uint8: the shorter side resized (Lanczos), then cropped at the centre.

    With size None the image keeps its size. Raises Unreadable with `name` if it is damaged or too
    large, Failure if the machine cannot read it.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = read_rgb(file)
    except BadImage as error:
        # The name alone of an error of Pillow's: its text contains paths
        reason = type(error.__cause__).__name__ if error.__cause__ else str(error)
        raise Unreadable(f"{name} ({reason})") from error

    if size is not None:
        # Resize the shorter side
        scale = size / min(image.size)
        width = max(size, round(image.width * scale))
        height = max(size, round(image.height * scale))
        resized = image.resize((width, height), Image.Resampling.LANCZOS)

        # Centre crop
        left = (width - size) // 2
        top = (height - size) // 2
        image = resized.crop((left, top, left + size, top + size))

    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).contiguous()


def images_from_uint8(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 → float32 in [−1, 1]."""
    return from_uint8(pixels.permute(0, 2, 3, 1).numpy())


def held_out_mask(labels: Tensor, seed: int, share: float = 0.1) -> Tensor:
    """[N] bool, true for the rows to hold out: `share` of each class, at random by `seed`.

    At least one row of each class, and never all.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        num_held_out = max(1, round(share * len(rows)))
        num_held_out = min(num_held_out, len(rows) - 1)
        order = torch.randperm(len(rows), generator=generator)
        mask[rows[order[:num_held_out]]] = True
    return mask
