"""Graded perturbations of latents: what a distilled distance is trained and measured on.

Each has a strength u in [0, 1], from hardly visible to another image:

    noise           x + σ·ε, σ from 0.02 to 2 on a logarithmic scale
    blur            a Gaussian of up to 2 latent pixels
    shift           up to 3 latent pixels in any direction
    interpolation   (1 − u)·x + u·x', x' the latents of another image
    patch           a square of up to the full side is that of x'
    transform       a weak random transform of the families geometric and color
    student         (1 − u)·x + u·x̂, x̂ what a student makes of the same noise and prompt

The kinds are those of the errors of a student: noisy, blurred, displaced, mixed, with another
object. Kinds and ranges are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion2gan.perceptual.augment import (
    Strengths,
    Transform,
    apply_transform,
    draw_transform,
    resample,
)

KINDS = ("noise", "blur", "shift", "interpolation", "patch", "transform", "student")
WITHOUT_STUDENTS = KINDS[:-1]

NOISE_RANGE = (0.02, 2.0)  # standard deviation
MAX_BLUR = 2.0  # standard deviation in latent pixels
MAX_SHIFT = 3.0  # latent pixels
WEAK = Strengths(
    scale_log2=0.15,
    rotate=0.05,
    aniso_log2=0.15,
    translate=0.02,
    brightness=0.3,
    contrast_log2=0.4,
    saturation_log2=0.6,
)


def perturb(
    x: Tensor,
    kind: str,
    strength: float,
    other: Tensor,
    student: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """`x` [C, h, w] perturbed by one of KINDS with `strength` in [0, 1], float32.

    `other`: the latents of another image. `student`: those of a student, for that kind. Random
    numbers come from `generator`, a CPU generator.
    """
    match kind:
        case "noise":
            low, high = NOISE_RANGE
            sigma = low * (high / low) ** strength
            return x + sigma * torch.randn(x.shape, generator=generator)
        case "blur":
            return blur(x, MAX_BLUR * strength)
        case "shift":
            angle = 2 * math.pi * float(torch.rand((), generator=generator))
            return shift(x, MAX_SHIFT * strength, angle)
        case "interpolation":
            return torch.lerp(x, other, strength)
        case "patch":
            return paste_square(x, other, strength, generator)
        case "transform":
            return transform_weakly(x, strength, generator)
        case "student":
            assert student is not None
            return torch.lerp(x, student, strength)
    raise ValueError(kind)


def blur(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `x` [C, h, w], `sigma` in pixels; x is continued by reflection."""
    height, width = x.shape[1:]
    wide = torch.cat([x, x.flip(2)], 2)
    extended = torch.cat([wide, wide.flip(1)], 1)  # [C, 2h, 2w], periodic

    vertical = torch.fft.fftfreq(2 * height)[:, None]
    horizontal = torch.fft.rfftfreq(2 * width)[None, :]
    squared_frequency = vertical.square() + horizontal.square()
    response = (-2 * (math.pi * sigma) ** 2 * squared_frequency).exp()
    blurred = torch.fft.irfft2(torch.fft.rfft2(extended) * response, s=extended.shape[1:])
    return blurred[:, :height, :width]


def shift(x: Tensor, pixels: float, angle: float) -> Tensor:
    """`x` [C, h, w] moved by a distance in pixels; fractions are interpolated (bicubic)."""
    height, width = x.shape[1:]
    matrix = torch.eye(2, 3)[None]
    matrix[0, 0, 2] = 2 * pixels * math.cos(angle) / width
    matrix[0, 1, 2] = 2 * pixels * math.sin(angle) / height
    return resample(x[None], matrix, "bicubic")[0]


def paste_square(x: Tensor, other: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """`x` [C, h, w] with a square of `other` at a random position, at least one pixel."""
    height, width = x.shape[1:]
    side = max(1, round(strength * min(height, width)))
    top = int(torch.randint(height - side + 1, (), generator=generator))
    left = int(torch.randint(width - side + 1, (), generator=generator))
    result = x.clone()
    result[:, top : top + side, left : left + side] = other[:, top : top + side, left : left + side]
    return result


def transform_weakly(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A random transform with WEAK strengths, `strength` of the way from the identity to it."""
    drawn = draw_transform(1, ("geometric", "color"), generator, WEAK)
    assert drawn.matrix is not None and drawn.gain is not None
    assert drawn.offset is not None and drawn.saturation is not None
    weakened = Transform(
        matrix=torch.lerp(torch.eye(2, 3)[None], drawn.matrix, strength),
        gain=drawn.gain**strength,
        offset=drawn.offset * strength,
        saturation=drawn.saturation**strength,
    )
    return apply_transform(x[None], weakened, "bicubic")[0]
