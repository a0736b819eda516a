"""Triplets for calibrating a perceptual distance: graded distortions of scenes.

**These are not human judgements.** Which of two looks more like the picture is decided by how far each was distorted:
within one family exactly so, in the sub-set `mixed` (two families) only where one grade is far above the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import atomic_write, write_image
from diffusion2gan.runtime.images import to_pictures
from diffusion2gan.runtime.progress import Bar

WORLD = 90  # neither trained nor measured on
FAMILIES = ("blur", "noise", "shift", "colour", "warp")
SUBSETS = (*FAMILIES, "mixed")
GAP, MIXED_GAP = 0.1, 0.5  # at least, between the two grades


@dataclass(frozen=True)
class Triplet:
    """`ref`, `p0`, `p1` [3, H, W] in [−1, 1]; `judge` 1 where p1 is the nearer, 0 where p0 is."""

    ref: Tensor
    p0: Tensor
    p1: Tensor
    judge: float


def triplet(number: int, subset: str, seed: int) -> Triplet:
    """A function of its three arguments alone."""
    key = np.random.SeedSequence([seed, SUBSETS.index(subset), number]).generate_state(1)
    generator = torch.Generator().manual_seed(int(key[0]))
    ref = scenes.draw([number], WORLD).images[0]
    gap = MIXED_GAP if subset == "mixed" else GAP
    low = float(torch.rand((), generator=generator)) * (1 - gap)
    high = low + gap + float(torch.rand((), generator=generator)) * (1 - gap - low)
    order = torch.randperm(len(FAMILIES), generator=generator).tolist()
    families = [FAMILIES[k] for k in order[:2]] if subset == "mixed" else [subset, subset]
    way = int(
        torch.randint(2**31, (), generator=generator)
    )  # both go the same way, one of them further
    near, far = (
        distort(ref, family, grade, torch.Generator().manual_seed(way))
        for family, grade in zip(families, (low, high), strict=True)
    )
    p1_is_near = bool(torch.rand((), generator=generator) < 0.5)
    return Triplet(ref, far, near, 1.0) if p1_is_near else Triplet(ref, near, far, 0.0)


def distort(image: Tensor, family: str, grade: float, generator: torch.Generator) -> Tensor:
    """[3, H, W] in [−1, 1]: `image` distorted by `grade` in [0, 1]; 0 changes nothing."""
    match family:
        case "blur":
            out = blur(image, 3.0 * grade)
        case "noise":
            out = image + 0.5 * grade * torch.randn(image.shape, generator=generator)
        case "shift":
            angle = 2 * math.pi * float(torch.rand((), generator=generator))
            way = torch.tensor([math.cos(angle), math.sin(angle)])
            out = displace(image, (6 * grade * way)[:, None, None].expand(2, *image.shape[1:]))
        case "colour":
            out = image + 0.5 * grade * F.normalize(
                torch.randn(3, 1, 1, generator=generator), dim=0
            )
        case "warp":
            coarse = torch.randn(1, 2, 4, 4, generator=generator)
            out = displace(
                image, 4 * grade * F.interpolate(coarse, image.shape[1:], mode="bicubic")[0]
            )
        case _:
            raise ValueError(f"no family {family!r}")
    return out.clamp(-1, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """A Gaussian of `sigma` pixels, mirrored at the edges."""
    if sigma == 0:
        return image
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    out = F.conv2d(F.pad(image[None], (radius, radius, 0, 0), mode="reflect"), kernel, groups=3)
    return F.conv2d(
        F.pad(out, (0, 0, radius, radius), mode="reflect"), kernel.transpose(2, 3), groups=3
    )[0]


def displace(image: Tensor, pixels: Tensor) -> Tensor:
    """Each place takes the value `pixels` [2, H, W] (x, y) away from it, mirrored outside."""
    height, width = image.shape[1:]
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, height, width], align_corners=False)
    moved = grid + pixels.permute(1, 2, 0)[None] * torch.tensor([2 / width, 2 / height])
    return F.grid_sample(image[None], moved, padding_mode="reflection", align_corners=False)[0]


def write_triplets(folder: Path, count: int, seed: int) -> None:
    """`count` triplets of each sub-set as FOLDER/<subset>/{ref,p0,p1}/*.png and judge/*.npy."""
    with Bar("triplets", count * len(SUBSETS)) as bar:
        for subset in SUBSETS:
            for number in range(count):
                _write(folder / subset, f"{number:06d}", triplet(number, subset, seed))
                bar.advance(1)


def _write(folder: Path, name: str, made: Triplet) -> None:
    """The judgement first: a triplet is there once its `ref` is."""
    with atomic_write(folder / "judge" / f"{name}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, np.array([made.judge], np.float32))
    for part in ("p0", "p1", "ref"):
        write_image(folder / part / f"{name}.png", to_pictures(getattr(made, part)[None])[0].save)
