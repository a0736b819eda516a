"""A folder of existing images, indexed by caption, that is used instead of a system."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion2gan.errors import UserError
from diffusion2gan.pipelines.system import System, load_system
from diffusion2gan.runtime.files import check_downloaded, sha256, walk_files
from diffusion2gan.runtime.images import (
    MAX_GENERATED_PIXELS,
    MAX_PIXELS,
    BadImage,
    open_image,
    read_rgb,
)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFolder:
    """Existing images, one per caption. `key` is a digest of their contents."""

    name: str
    files: Mapping[int, Path]
    key: str
    note: str = "images"

    @property
    def formats(self) -> list[str]:
        """Their file formats, such as png. Images in jpg have lost detail before evaluation."""
        return sorted({path.suffix.lower().lstrip(".") for path in self.files.values()})

    def read(self, indices: Sequence[int]) -> Iterator[Images]:
        """Yields the images of captions, [H, W, 3] uint8 each.

        Raises UserError if a caption has no image or its file cannot be read.
        """
        self._check_exist(indices)
        for index in indices:
            yield read_image(self.files[index], MAX_GENERATED_PIXELS)

    def check(self, indices: Sequence[int]) -> None:
        """Raises UserError if a caption has no image, or one of a size that is not read.

        Only the headers of the images are read.
        """
        self._check_exist(indices)
        for index in indices:
            read_size(self.files[index], MAX_GENERATED_PIXELS)

    def _check_exist(self, indices: Sequence[int]) -> None:
        missing = [index for index in indices if index not in self.files]
        if missing:
            raise UserError(
                f"{self.name} has no image for caption {missing[0]}. The number in a file's name "
                "is its caption's index, from 0: 000000.png belongs to caption 0. The folder has "
                f"{len(self.files)} images, and {len(indices)} are needed."
            )


def open_system(
    name: str,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    device: str = "cpu",
    precision: str = "float32",
    resolution: int | None = None,
) -> System | ImageFolder:
    """A system as `load_system` loads it, or a folder of images.

    A folder without a model_index.json is a folder of images: FOLDER or NAME=FOLDER.
    """
    whole = Path(name).expanduser()
    label, equals, path = (name, "", "") if whole.exists() else name.partition("=")
    folder = Path(path).expanduser() if equals else whole
    has_pipeline = (folder / "model_index.json").exists()
    if folder.is_dir() and not has_pipeline:
        if num_inference_steps is not None or guidance_scale is not None:
            raise UserError(
                f"{folder} is a folder of images, to which neither a number of steps nor a "
                "guidance scale applies; leave both out"
            )
        return open_images(label, folder)
    return load_system(name, num_inference_steps, guidance_scale, device, precision, resolution)


def open_images(name: str, folder: Path) -> ImageFolder:
    """The images of a folder. The last number in a file's name is its caption's index.

    Examples: 000000.png, gigagan_12.jpg. Raises UserError if a name has no number or two have the
    same one.
    """
    files: dict[int, Path] = {}
    for path in image_files(folder):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise UserError(
                f"{path}: the name of an image must contain its caption's index, such as "
                "000000.png for caption 0"
            )
        index = int(numbers[-1])
        if index in files:
            raise UserError(
                f"{path} and {files[index]} are both for caption {index}; keep one of them"
            )
        files[index] = path

    digests = [f"{index}:{sha256(path)}\n" for index, path in sorted(files.items())]
    return ImageFolder(name, files, hashlib.sha256("".join(digests).encode()).hexdigest()[:16])


def image_files(folder: Path) -> list[Path]:
    """The images in `folder` and below it, sorted by path; hidden files are no images.

    Raises UserError if there is none.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of images: {folder}")
    files = [path for path in walk_files(folder) if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{folder} contains no images ({', '.join(sorted(SUFFIXES))})")
    return files


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Images:
    """[H, W, 3] uint8, as `read_rgb` reads it.

    Raises UserError if the file is not an image, damaged or too large.
    """
    with _refusing(path):
        return np.asarray(read_rgb(path, max_pixels))


def read_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) from the header. Raises UserError as `read_image` does."""
    with _refusing(path), open_image(path, max_pixels) as image:
        return image.size


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    check_downloaded(path)
    try:
        yield
    except BadImage as error:
        raise UserError(f"{path} cannot be read as an image ({error}); replace it") from error
