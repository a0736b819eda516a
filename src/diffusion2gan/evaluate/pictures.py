"""Pictures to measure: made by a system and kept on disk, or a folder of images by caption index."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.systems import System, load_system
from diffusion2gan.pairs.store import noise_of, pair_seed
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.progress import Bar, console
from diffusion2gan.runtime.ranks import ranks, ranks_connected
from diffusion2gan.runtime.stop import stop_signal

NOISE_SET = 128  # + seed: noises that no set of pairs with a seed below 128 has
NOISE_STRIDE = 2**18  # caption i's k-th noise is number i + k · NOISE_STRIDE of its set
MAX_NOISES = 64
MAX_DIVERSITY = 256  # captions whose further noises are looked at
CHUNK = 64
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
            raise UserError(f"{path}: a picture is named by its caption's number, such as 000000.png for caption 0")
        index = int(numbers[-1])
        if index in found:
            raise UserError(f"{path} and {found[index]} are both of caption {index}; keep one of them")
        found[index] = path
    told = "".join(f"{index}:{sha256(path)}\n" for index, path in sorted(found.items()))
    return ImageFolder(name, found, hashlib.sha256(told.encode()).hexdigest()[:16])


def open_system(
    name: str, num_inference_steps: int | None = None, guidance_scale: float | None = None, device: str = "cpu",
    precision: str = "float32",
) -> System | ImageFolder:  # fmt: skip
    """A system by `load_system`, or a folder of pictures: FOLDER or NAME=FOLDER without a model_index.json."""
    label, equals, path = name.partition("=")
    folder = Path(path if equals else name)
    if folder.is_dir() and not (folder / "model_index.json").exists() and "+" not in name:
        if (num_inference_steps, guidance_scale) != (None, None):
            raise UserError(f"{folder} is a folder of pictures: it takes neither steps nor guidance")
        return open_images(label, folder)
    return load_system(name, num_inference_steps, guidance_scale, device, precision)


def read_image(path: Path) -> Pictures:
    """[H, W, 3] uint8. Raises UserError where the file is no picture or damaged."""
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds on damaged files: OSError, SyntaxError, struct.error, …
        raise UserError(f"{path} cannot be read as a picture ({type(error).__name__}: {error}); replace it") from error


def fitted(picture: Pictures, side: int) -> Pictures:
    """[side, side, 3]: the largest square in the middle, resized by Lanczos with Pillow, which filters well."""
    height, width, _ = picture.shape
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    cut = picture[top : top + square, left : left + square]
    if square == side:
        return cut
    return np.asarray(Image.fromarray(cut).resize((side, side), Image.Resampling.LANCZOS))


def middle(pictures: Pictures, side: int) -> Pictures:
    """[N, side, side, 3]: the middle cut out, nothing resized: what a *patch* Fréchet distance looks at."""
    height, width = pictures.shape[1:3]
    if min(height, width) < side:
        raise UserError(f"patches of {side} pixels cannot be cut out of {width}×{height} pictures")
    top, left = (height - side) // 2, (width - side) // 2
    return pictures[:, top : top + side, left : left + side]


def warn_few(count: int, dimension: int, remedy: str) -> None:
    """Says so where there are fewer pictures than features have numbers."""
    if count <= dimension:
        console.print(
            f"warning: {count} pictures for features of {dimension} numbers: their covariance is singular, and the "
            f"Fréchet distance mostly tells how few they are; {remedy}.", soft_wrap=True,
        )  # fmt: skip


def noise_seeds(seed: int, indices: Sequence[int], nth: int = 0) -> list[int]:
    """The seed of each caption's `nth` noise: depends on the caption's index alone."""
    return [pair_seed(NOISE_SET + seed, nth * NOISE_STRIDE + i) for i in indices]


def chunks(
    system: System | ImageFolder, prompts: Sequence[str], seed: int, cache: Path, *, nth: int = 0,
    batch_size: int = CHUNK, share: tuple[int, int] = (0, 1),
) -> Iterator[list[Pictures]]:  # fmt: skip
    """Lists of 64 pictures [H, W, 3] of the prompts; made ones are kept in `cache` and not made twice.

    `share` (rank, ranks): every ranks-th list alone, from the rank-th on.
    """
    folder = cache / (f"{system.key}-{seed}" + (f"-noise{nth}" if nth else ""))
    starts = range(0, len(prompts), CHUNK)[share[0] :: share[1]]
    if isinstance(system, ImageFolder):
        system.check(range(len(prompts)))  # before an hour of features, not after
        if len(system.files) > len(prompts):
            console.print(
                f"{system.name}: {len(system.files)} pictures, and those of {len(prompts)} captions are taken"
            )
    total = sum(len(prompts[start : start + CHUNK]) for start in starts)
    with stop_signal() as stopped, Bar(f"pictures of {system.name}", total) as bar:
        for start in starts:
            if stopped():
                raise KeyboardInterrupt
            some = list(prompts[start : start + CHUNK])
            if isinstance(system, ImageFolder):
                yield system.read(range(start, start + len(some)))
            else:
                seeds = noise_seeds(seed, range(start, start + len(some)), nth)
                yield list(_made(system, some, seeds, folder / f"{start:06d}-{len(some)}.safetensors", batch_size))
            bar.advance(len(some))


def make_by_ranks(
    orders: Sequence[tuple[System | ImageFolder, Sequence[str], int]], seed: int, cache: Path, batch_size: int = CHUNK
) -> bool:
    """Under torchrun every rank makes its share of each order, (system, prompts, nth noise), and waits for the others.

    Whether this process goes on to measure: the first rank alone, which then finds all pictures in `cache`.
    """
    here = ranks()
    if here.world == 1:
        return True
    with ranks_connected(torch.device("cpu")) as group:
        for system, prompts, nth in orders:
            if isinstance(system, System):
                share = (here.rank, here.world)
                for _ in chunks(system, prompts, seed, cache, nth=nth, batch_size=batch_size, share=share):
                    pass
        group.meet()
    return here.first


def _made(system: System, prompts: list[str], seeds: list[int], path: Path, batch_size: int) -> Pictures:
    """The pictures in `path`; made and written first where there are none, or of other prompts."""
    if path.exists():
        tensors, meta = checkpoint.load(path)
        if meta.get("prompts") == prompts:
            return np.asarray(tensors["pictures"].numpy())
    parts = [
        system.generate(prompts[i : i + batch_size], noise_of(seeds[i : i + batch_size], system.latent_shape))
        for i in range(0, len(prompts), batch_size)
    ]
    pictures = np.concatenate(parts)
    checkpoint.save(path, {"pictures": torch.from_numpy(pictures)}, {"prompts": prompts})
    return pictures
