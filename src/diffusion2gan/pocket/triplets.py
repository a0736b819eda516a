"""Triplets for calibrating a perceptual distance: graded distortions of scenes.

**These are not human judgements.** Which of two distorted images is more similar to the reference
follows from the grades of the distortions. Within one family this is exact; in the subset `mixed`
(two different families) only triplets with clearly different grades are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.cache import ensure_settings
from diffusion2gan.runtime.files import atomic_write, write_image
from diffusion2gan.runtime.images import to_pillow
from diffusion2gan.runtime.progress import Bar

WORLD = 90  # a world seed that is used neither for training nor for evaluation
DISTORTIONS = ("blur", "noise", "shift", "colour", "warp")
SUBSETS = (*DISTORTIONS, "mixed")
# The smallest difference between the two grades
GAP = 0.1
MIXED_GAP = 0.5


@dataclass(frozen=True)
class Triplet:
    """`ref`, `p0`, `p1` [3, H, W] in [−1, 1]; `judge` is 1 if p1 is more similar, 0 if p0 is."""

    ref: Tensor
    p0: Tensor
    p1: Tensor
    judge: float


def make_triplet(number: int, subset: str, seed: int) -> Triplet:
    """Triplet `number` of `subset`: a pure function of the three arguments."""
    sequence = np.random.SeedSequence([seed, SUBSETS.index(subset), number])
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
    ref = scenes.draw([number], WORLD).images[0]

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    # Two grades, `gap` or more apart
    gap = MIXED_GAP if subset == "mixed" else GAP
    low = uniform() * (1 - gap)
    high = low + gap + uniform() * (1 - gap - low)

    # The family of each distortion
    order = torch.randperm(len(DISTORTIONS), generator=generator).tolist()
    near_family = far_family = subset
    if subset == "mixed":
        near_family = DISTORTIONS[order[0]]
        far_family = DISTORTIONS[order[1]]

    # Both have the same seed: within a family the distortions differ only in their strength
    distortion_seed = int(torch.randint(2**31, (), generator=generator))
    near = distort(ref, near_family, low, torch.Generator().manual_seed(distortion_seed))
    far = distort(ref, far_family, high, torch.Generator().manual_seed(distortion_seed))

    p1_is_near = bool(torch.rand((), generator=generator) < 0.5)
    if p1_is_near:
        return Triplet(ref, p0=far, p1=near, judge=1.0)
    return Triplet(ref, p0=near, p1=far, judge=0.0)


def distort(image: Tensor, family: str, grade: float, generator: torch.Generator) -> Tensor:
    """`image` [3, H, W] in [−1, 1] distorted by `grade` in [0, 1]; grade 0 is the identity."""
    match family:
        case "blur":
            distorted = blur(image, 3.0 * grade)
        case "noise":
            distorted = image + 0.5 * grade * torch.randn(image.shape, generator=generator)
        case "shift":
            # By up to 6 pixels in a random direction
            angle = 2 * math.pi * float(torch.rand((), generator=generator))
            direction = torch.tensor([math.cos(angle), math.sin(angle)])
            offset = (6 * grade * direction)[:, None, None]
            distorted = displace(image, offset.expand(2, *image.shape[1:]))
        case "colour":
            # A random direction in RGB space
            direction = F.normalize(torch.randn(3, 1, 1, generator=generator), dim=0)
            distorted = image + 0.5 * grade * direction
        case "warp":
            # A smooth random displacement field of a few pixels at grade 1
            coarse = torch.randn(1, 2, 4, 4, generator=generator)
            smooth = F.interpolate(coarse, image.shape[1:], mode="bicubic")[0]
            distorted = displace(image, 4 * grade * smooth)
        case _:
            raise ValueError(f"no family {family!r}")
    return distorted.clamp(-1, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """`image` [3, H, W] filtered by a Gaussian of `sigma` pixels, reflected at the edges."""
    if sigma == 0:
        return image

    # The kernel, [3, 1, 1, width]
    radius = math.ceil(3 * sigma)
    positions = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (positions / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)

    # Horizontally, then vertically
    padded = F.pad(image[None], (radius, radius, 0, 0), mode="reflect")
    blurred = F.conv2d(padded, kernel, groups=3)
    padded = F.pad(blurred, (0, 0, radius, radius), mode="reflect")
    return F.conv2d(padded, kernel.transpose(2, 3), groups=3)[0]


def displace(image: Tensor, pixels: Tensor) -> Tensor:
    """Samples `image` [3, H, W] at each position plus `pixels` [2, H, W] (x, y).

    The image is continued by reflection beyond its edges.
    """
    height, width = image.shape[1:]
    identity = torch.eye(2, 3)[None]
    grid = F.affine_grid(identity, [1, 3, height, width], align_corners=False)

    # The grid's coordinates span 2 over a side
    per_pixel = torch.tensor([2 / width, 2 / height])
    grid = grid + pixels.permute(1, 2, 0)[None] * per_pixel
    sampled = F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)
    return sampled[0]


def write_triplets(folder: Path, count: int, seed: int) -> None:
    """Writes `count` triplets of each subset in the layout of BAPPS.

    FOLDER/<subset>/{ref,p0,p1}/*.png and judge/*.npy, see `perceptual/triplets.py`. Raises
    UserError, and writes nothing, if `folder` contains anything else, or triplets of another seed.
    """
    settings = folder / "triplets.json"
    if folder.exists() and not settings.is_file() and any(folder.iterdir()):
        raise UserError(
            f"{folder} already exists and contains no triplets of this command "
            f"({settings.name} is missing), so nothing is written to it; choose another --out."
        )
    ensure_settings(settings, {"world": "pocket", "seed": seed})

    with Bar("triplets", count * len(SUBSETS)) as bar:
        for subset in SUBSETS:
            for number in range(count):
                triplet = make_triplet(number, subset, seed)
                _write(folder / subset, f"{number:06d}", triplet)
                bar.advance(1)


def _write(folder: Path, name: str, triplet: Triplet) -> None:
    """Writes `ref` last: a triplet is complete if its `ref` exists."""
    # Judgement
    judgement = np.array([triplet.judge], np.float32)
    path = folder / "judge" / f"{name}.npy"
    with atomic_write(path, flush_to_disk=False) as temporary, temporary.open("wb") as file:
        np.save(file, judgement)

    # Images
    images = {"p0": triplet.p0, "p1": triplet.p1, "ref": triplet.ref}
    for key, image in images.items():
        pillow_image = to_pillow(image[None])[0]
        write_image(folder / key / f"{name}.png", pillow_image.save, flush_to_disk=False)
