"""A folder of pictures in the place of a system, by caption index."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.pipelines.system import System, load_system
from diffusion2gan.runtime.files import sha256

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFolder:
    """Pictures that are there already, by caption index. `key` names their contents."""

    name: str
    files: Mapping[int, Path]
    key: str
    note: str = "pictures"

    @property
    def formats(self) -> list[str]:
        """Their file formats, such as png; jpg pictures have lost something before they are measured."""
        return sorted({path.suffix.lower().lstrip(".") for path in self.files.values()})

    def read(self, indices: Sequence[int]) -> list[Pictures]:
        """[H, W, 3] each. Raises UserError where an index has no picture, or it cannot be read."""
        self.check(indices)
        return [read_image(self.files[i]) for i in indices]

    def check(self, indices: Sequence[int]) -> None:
        """Raises UserError where an index has no picture."""
        missing = [i for i in indices if i not in self.files]
        if missing:
            raise UserError(
                f"{self.name} has no picture of caption {missing[0]}; a file's number is its caption's, from 0: "
                f"000000.png is caption 0's. It has {len(self.files)} pictures, and {len(indices)} are asked for."
            )


def image_files(folder: Path) -> list[Path]:
    """The pictures in and below `folder`, by name. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"no folder of pictures: {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not files:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(IMAGES))})")
    return files


def open_images(name: str, folder: Path) -> ImageFolder:
    """A system's pictures, named by caption index: 000000.png, gigagan_12.jpg: the last number counts.

    Raises UserError where a name has no number or two have the same.
    """
    found: dict[int, Path] = {}
    for path in image_files(folder):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise UserError(
                f"{path}: a picture is named by its caption's number, such as 000000.png for caption 0"
            )
        index = int(numbers[-1])
        if index in found:
            raise UserError(
                f"{path} and {found[index]} are both of caption {index}; keep one of them"
            )
        found[index] = path
    told = "".join(f"{index}:{sha256(path)}\n" for index, path in sorted(found.items()))
    return ImageFolder(name, found, hashlib.sha256(told.encode()).hexdigest()[:16])


def open_system(
    name: str,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    device: str = "cpu",
    precision: str = "float32",
    resolution: int | None = None,
) -> System | ImageFolder:
    """A system by `load_system`, or a folder of pictures: FOLDER or NAME=FOLDER without a model_index.json."""
    label, equals, path = name.partition("=")
    folder = Path(path if equals else name)
    if folder.is_dir() and not (folder / "model_index.json").exists() and "+" not in name:
        if (num_inference_steps, guidance_scale) != (None, None):
            raise UserError(
                f"{folder} is a folder of pictures: it takes neither steps nor guidance"
            )
        return open_images(label, folder)
    return load_system(name, num_inference_steps, guidance_scale, device, precision, resolution)


def read_image(path: Path) -> Pictures:
    """[H, W, 3] uint8. Raises UserError where the file is no picture or damaged."""
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (
        Exception
    ) as error:  # Pillow raises many kinds on damaged files: OSError, SyntaxError, struct.error, …
        raise UserError(
            f"{path} cannot be read as a picture ({type(error).__name__}: {error}); replace it"
        ) from error
