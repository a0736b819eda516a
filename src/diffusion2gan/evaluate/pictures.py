"""Pictures to measure: made by a system and kept on disk, or a folder of images by caption index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pipelines.image_folder import ImageFolder, Pictures
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import connect_ranks, get_ranks
from diffusion2gan.runtime.progress import Bar, console
from diffusion2gan.runtime.stop import stop_signal

NOISE_SET = 128  # + seed: noises that no set of pairs with a seed below 128 has
NOISE_STRIDE = 2**18  # caption i's k-th noise is number i + k · NOISE_STRIDE of its set
MAX_NOISES = 64
MAX_DIVERSITY = 256  # captions whose further noises are looked at
CHUNK = 64


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
            f"Fréchet distance mostly tells how few they are; {remedy}.",
            soft_wrap=True,
        )


def noise_seeds(seed: int, indices: Sequence[int], nth: int = 0) -> list[int]:
    """The seed of each caption's `nth` noise: depends on the caption's index alone."""
    return [pair_seed(NOISE_SET + seed, nth * NOISE_STRIDE + i) for i in indices]


def chunks(
    system: System | ImageFolder,
    prompts: Sequence[str],
    seed: int,
    cache: Path,
    *,
    nth: int = 0,
    batch_size: int = CHUNK,
    share: tuple[int, int] = (0, 1),
) -> Iterator[list[Pictures]]:
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
                yield list(
                    _made(
                        system,
                        some,
                        seeds,
                        folder / f"{start:06d}-{len(some)}.safetensors",
                        batch_size,
                    )
                )
            bar.advance(len(some))


def make_by_ranks(
    orders: Sequence[tuple[System | ImageFolder, Sequence[str], int]],
    seed: int,
    cache: Path,
    batch_size: int = CHUNK,
) -> bool:
    """Under torchrun every rank makes its share of each order, (system, prompts, nth noise), and waits for the others.

    Whether this process goes on to measure: the first rank alone, which then finds all pictures in `cache`.
    """
    here = get_ranks()
    if here.world_size == 1:
        return True
    with connect_ranks(torch.device("cpu")) as group:
        for system, prompts, nth in orders:
            if isinstance(system, System):
                share = (here.rank, here.world_size)
                for _ in chunks(
                    system, prompts, seed, cache, nth=nth, batch_size=batch_size, share=share
                ):
                    pass
        group.barrier()
    return here.is_main


def _made(
    system: System, prompts: list[str], seeds: list[int], path: Path, batch_size: int
) -> Pictures:
    """The pictures in `path`; made and written first where there are none, or of other prompts."""
    if path.exists():
        tensors, meta = checkpoint.load(path)
        if meta.get("prompts") == prompts:
            return np.asarray(tensors["pictures"].numpy())
    parts = [
        system.generate(
            prompts[i : i + batch_size],
            noise_from_seeds(seeds[i : i + batch_size], system.latent_shape),
        )
        for i in range(0, len(prompts), batch_size)
    ]
    pictures = np.concatenate(parts)
    checkpoint.save(path, {"pictures": torch.from_numpy(pictures)}, {"prompts": prompts})
    return pictures
