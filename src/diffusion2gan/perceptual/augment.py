"""Random differentiable transforms T for E-LatentLPIPS, after StyleGAN2-ADA (Karras et al. 2020, appendix B), p = 1.

A `Transform` is drawn first and applied afterwards, so that both sides of a distance get the same one. Everything
runs in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.errors import UserError, nearest

FAMILIES = ("blit", "geometric", "color", "cutout")


@dataclass(frozen=True)
class Strengths:
    """How far T goes. Translations are shares of the picture's side, angles shares of a full turn."""

    blit_translate: float = 0.125
    scale_log2: float = 0.2
    rotate: float = 0.5
    aniso_log2: float = 0.2
    translate: float = 0.125
    brightness: float = 0.2
    contrast_log2: float = 0.5
    saturation_log2: float = 1.0
    cutout: float = 0.5


@dataclass(frozen=True)
class BatchRows:
    """Which rows of a larger batch two tensors are: `rows` of a batch of `batch_size` samples.

    Transforms are drawn for the full batch and these rows are taken from it, so that dividing a batch into
    micro-batches, or over ranks, does not change which transform a sample gets.
    """

    rows: slice
    batch_size: int


@dataclass(frozen=True)
class Transform:
    """One T per sample; None where a part is off.

    `matrix` [B, 2, 3] maps output to input coordinates in [−1, 1]; `shift` [B, 2] is a translation (x, y) in shares
    of the side, rounded to whole pixels where it is applied; `gain` and `offset` [B, 1, 1, 1] and `saturation`
    [B, 1, 1, 1] recolour; `box` [B, 4] is the cutout (x0, y0, x1, y1) in [0, 1].
    """

    matrix: Tensor | None = None
    shift: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    saturation: Tensor | None = None
    box: Tensor | None = None

    def rows(self, rows: slice) -> Transform:
        """The Ts of these samples."""
        return Transform(*(None if value is None else value[rows] for value in vars(self).values()))


def parse_families(transforms: str) -> tuple[str, ...]:
    """`"geometric+cutout"` → ("geometric", "cutout"); `""` → (). Raises UserError at an unknown family."""
    names = tuple(name for name in transforms.split("+") if name)
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"unknown transform family {name!r}{nearest(name, FAMILIES)}")
    return names


def draw_transform(
    batch: int,
    families: tuple[str, ...],
    generator: torch.Generator | None = None,
    strengths: Strengths | None = None,
    device: torch.device | str = "cpu",
) -> Transform:
    """A fresh T for each of `batch` samples, on `device`.

    Random numbers come from `generator`, on its own device (a CPU one gives the same T on every machine). Without one
    they are drawn on `device` by torch's own: nothing waits for the host, and it compiles without a graph break.
    """
    s = strengths or Strengths()
    home = device if generator is None else generator.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator, device=home) * (high - low) + low

    def normal(std: float) -> Tensor:
        return torch.randn(batch, generator=generator, device=home) * std

    matrix, shift = torch.eye(3, device=home).expand(batch, 3, 3), None
    if "blit" in families:
        quarter = (uniform(0, 4)).floor() * (math.pi / 2)
        flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
        matrix = matrix @ _scale(flip, torch.ones_like(flip)) @ _turn(quarter)
        shift = torch.stack([uniform(-s.blit_translate, s.blit_translate) for _ in "xy"], 1)
    if "geometric" in families:
        isotropic, aniso = 2 ** normal(s.scale_log2), 2 ** normal(s.aniso_log2)
        before, after = (
            uniform(-1, 1) * math.pi * 2 * s.rotate,
            uniform(-1, 1) * math.pi * 2 * s.rotate,
        )
        matrix = matrix @ _scale(isotropic, isotropic) @ _turn(before)
        matrix = matrix @ _scale(aniso, 1 / aniso) @ _turn(after - before)
        matrix = _shift(normal(2 * s.translate), normal(2 * s.translate)) @ matrix
    moved = "blit" in families or "geometric" in families
    transform = Transform(matrix=matrix[:, :2].contiguous() if moved else None, shift=shift)
    if "color" in families:
        column = (batch, 1, 1, 1)
        transform = replace(
            transform,
            gain=(2 ** normal(s.contrast_log2)).reshape(column),
            offset=normal(s.brightness).reshape(column),
            saturation=(2 ** normal(s.saturation_log2)).reshape(column),
        )
    if "cutout" in families:
        x, y, half = uniform(0, 1), uniform(0, 1), s.cutout / 2
        transform = replace(transform, box=torch.stack([x - half, y - half, x + half, y + half], 1))
    return Transform(
        *(None if value is None else value.to(device) for value in vars(transform).values())
    )


def apply_transform(x: Tensor, transform: Transform) -> Tensor:
    """T(x), [B, C, h, w], float32, differentiable. Outside the picture it is mirrored; the cutout is zero."""
    x = x.float()
    if (
        transform.saturation is not None
        and transform.gain is not None
        and transform.offset is not None
    ):
        grey = x.mean(1, keepdim=True)
        x = (grey + (x - grey) * transform.saturation) * transform.gain + transform.offset
    if transform.matrix is not None:
        grid = F.affine_grid(_whole_pixels(transform, x), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if transform.box is not None:
        height, width = x.shape[2:]
        column = ((torch.arange(width, device=x.device) + 0.5) / width)[None, None, None, :]
        row = ((torch.arange(height, device=x.device) + 0.5) / height)[None, None, :, None]
        x0, y0, x1, y1 = (edge[:, None, None, None] for edge in transform.box.unbind(1))
        inside = (column >= x0) & (column < x1) & (row >= y0) & (row < y1)
        x = x * (~inside).float()
    return x


def _whole_pixels(transform: Transform, x: Tensor) -> Tensor:
    """[B, 2, 3]: the matrix with `shift` added, in whole pixels of `x`."""
    assert transform.matrix is not None
    if transform.shift is None:
        return transform.matrix
    moves = [
        (transform.shift[:, axis] * side).round() / side
        for axis, side in enumerate((x.shape[3], x.shape[2]))
    ]
    return transform.matrix + F.pad(2 * torch.stack(moves, 1)[:, :, None], (2, 0))


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _turn(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return _matrix([[c, -s, zero], [s, c, zero], [zero, zero, one]])


def _scale(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _shift(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])
