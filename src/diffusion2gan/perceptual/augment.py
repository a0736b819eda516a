"""The random differentiable transforms T of E-LatentLPIPS (Kang et al. 2024, section 3.2).

E-LatentLPIPS is the expectation of LatentLPIPS over random transforms: E_T[d(T x0, T x1)]. The
paper names the families blit, geometric, colour and cutout, but not their strengths; distributions
and defaults here are those of StyleGAN2-ADA (Karras et al. 2020, appendix B), every transform with
probability p = 1.

A `Transform` is drawn first and applied afterwards, so that both sides of a distance get the same
one. Everything runs in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.recipe import ResamplingName
from diffusion2gan.runtime.transfer import to_device

TRANSFORM_FAMILIES = ("blit", "geometric", "color", "cutout")


@dataclass(frozen=True)
class Strengths:
    """The magnitude of each transform.

    Translations and the cutout's side are fractions of the image's side. `blit_translate` is the
    bound of a uniform distribution; `rotate` is the bound of a uniform distribution of angles in
    full turns (0.5: any angle). All others but `cutout` are standard deviations of normal
    distributions: `_log2` ones of the factor's base-2 logarithm.
    """

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
class TransformSettings:
    """Which transforms are drawn, how strong, how often, and how they are resampled.

    `families`: those of `parse_families`; () for no transforms. `share`: the probability that a
    sample gets a transform; the others stay as they are. `resampling`: see `resample`.

    Raises UserError for an unknown resampling and for a share outside of (0, 1].
    """

    families: tuple[str, ...] = ()
    strengths: Strengths = Strengths()
    share: float = 1.0
    resampling: ResamplingName = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(
                f"transform_share = {self.share}: the share of the samples that get a transform "
                "must be above 0 and at most 1; for no transforms use latent_lpips"
            )
        names = get_args(ResamplingName)
        if self.resampling not in names:
            raise UserError(
                f"resampling = {self.resampling!r}: it must be one of {', '.join(names)}"
                f"{nearest(self.resampling, names)}"
            )

    def draw(
        self, batch_size: int, generator: torch.Generator | None, device: torch.device | str
    ) -> Transform:
        """`draw_transform` with these settings."""
        return draw_transform(
            batch_size, self.families, generator, self.strengths, device, self.share
        )

    def describe(self) -> dict[str, str | float] | None:
        """The settings as a network's files record them; None if there are no transforms."""
        if not self.families:
            return None
        return {
            "families": "+".join(self.families),
            "share": self.share,
            "resampling": self.resampling,
        }


@dataclass(frozen=True)
class BatchRows:
    """Which rows of a larger batch two tensors are: `rows` of a batch of `batch_size` samples.

    Transforms are drawn for the full batch and these rows are taken from it, so that dividing a
    batch into micro-batches, or over ranks, does not change which transform a sample gets.
    """

    rows: slice
    batch_size: int


@dataclass(frozen=True)
class Transform:
    """One transform T per sample. A field is None if its family is off."""

    # [B, 2, 3] affine map from output to input coordinates, both in [−1, 1] (`F.affine_grid`).
    matrix: Tensor | None = None
    # [B, 2] translation (x, y) as a fraction of the side, rounded to integer pixels when applied.
    shift: Tensor | None = None
    # [B, 1, 1, 1] contrast factor, > 0.
    gain: Tensor | None = None
    # [B, 1, 1, 1] brightness, added after the gain.
    offset: Tensor | None = None
    # [B, 1, 1, 1] factor of the deviation from the mean over channels, > 0.
    saturation: Tensor | None = None
    # [B, 4] cutout (x0, y0, x1, y1) as fractions of the sides; may extend beyond [0, 1].
    box: Tensor | None = None
    # [B, 1, 1, 1] bool, whether the sample is transformed at all; None if every one is.
    is_applied: Tensor | None = None
    # Whether every pixel moves to the position of a pixel: flips, quarter rotations and `shift`.
    moves_whole_pixels: bool = False

    def select(self, rows: slice | Tensor) -> Transform:
        """The transforms of these samples."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Transform:
        """The same transforms on `device`."""
        return self._map(lambda value: to_device(value, device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Transform:
        # Field by field: `vars(self)` breaks a compiled graph in some versions of torch
        return Transform(
            matrix=None if self.matrix is None else function(self.matrix),
            shift=None if self.shift is None else function(self.shift),
            gain=None if self.gain is None else function(self.gain),
            offset=None if self.offset is None else function(self.offset),
            saturation=None if self.saturation is None else function(self.saturation),
            box=None if self.box is None else function(self.box),
            is_applied=None if self.is_applied is None else function(self.is_applied),
            moves_whole_pixels=self.moves_whole_pixels,
        )


def parse_families(transforms: str) -> tuple[str, ...]:
    """Splits `"geometric+cutout"` into ("geometric", "cutout"), and `""` into ().

    Raises UserError for an unknown family.
    """
    names = tuple(name for name in transforms.split("+") if name)
    for name in names:
        if name not in TRANSFORM_FAMILIES:
            raise UserError(f"unknown transform family {name!r}{nearest(name, TRANSFORM_FAMILIES)}")
    return names


NO_TRANSFORMS = TransformSettings()


def parse_transforms(transforms: str, share: float, resampling: str) -> TransformSettings:
    """The settings of three options. Raises UserError as `TransformSettings` does."""
    return TransformSettings(
        parse_families(transforms), share=share, resampling=cast(ResamplingName, resampling)
    )


@dataclass(frozen=True)
class _Sampler:
    """Draws one number per sample, [B] float32, from `generator` on its device."""

    batch_size: int
    generator: torch.Generator | None
    device: torch.device | str

    def uniform(self, low: float, high: float) -> Tensor:
        numbers = torch.rand(self.batch_size, generator=self.generator, device=self.device)
        return numbers * (high - low) + low

    def normal(self, std: float) -> Tensor:
        numbers = torch.randn(self.batch_size, generator=self.generator, device=self.device)
        return numbers * std


def draw_transform(
    batch_size: int,
    families: tuple[str, ...],
    generator: torch.Generator | None = None,
    strengths: Strengths | None = None,
    device: torch.device | str = "cpu",
    share: float = 1.0,
) -> Transform:
    """Draws an independent transform for each of `batch_size` samples, on `device`.

    Each sample gets its transform with probability `share`, and none otherwise.

    Random numbers come from `generator`, on the generator's device: a CPU generator gives the same
    transforms on every machine. Without one they are drawn on `device` by torch's global generator;
    this needs no synchronisation with the host and compiles without a graph break.
    """
    if strengths is None:
        strengths = Strengths()
    draw_device = device if generator is None else generator.device
    sampler = _Sampler(batch_size, generator, draw_device)

    # The order of the draws below is fixed: changing it changes every transform of a seed.
    transform = Transform()
    matrix = torch.eye(3, device=draw_device).expand(batch_size, 3, 3)
    if "blit" in families:
        matrix, shift = _draw_blit(sampler, strengths, matrix)
        transform = replace(transform, shift=shift)
    if "geometric" in families:
        matrix = _draw_geometric(sampler, strengths, matrix)
    if "blit" in families or "geometric" in families:
        transform = replace(
            transform,
            matrix=matrix[:, :2].contiguous(),
            moves_whole_pixels="geometric" not in families,
        )
    if "color" in families:
        gain, offset, saturation = _draw_color(sampler, strengths)
        transform = replace(transform, gain=gain, offset=offset, saturation=saturation)
    if "cutout" in families:
        transform = replace(transform, box=_draw_cutout(sampler, strengths))
    if share < 1:
        is_applied = sampler.uniform(0, 1) < share
        transform = replace(transform, is_applied=is_applied.reshape(batch_size, 1, 1, 1))

    return transform.to(device)


def _draw_blit(sampler: _Sampler, strengths: Strengths, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel blitting: a horizontal flip, a rotation by a multiple of 90° and an integer shift.

    Returns (`matrix` with flip and rotation appended [B, 3, 3], shift [B, 2]).
    """
    # Rotation and flip
    angle = sampler.uniform(0, 4).floor() * (math.pi / 2)
    flip = torch.where(sampler.uniform(0, 1) < 0.5, -1.0, 1.0)
    mirror = _scaling(flip, torch.ones_like(flip))
    matrix = matrix @ mirror @ _rotation(angle)

    # Shift
    bound = strengths.blit_translate
    shift_x = sampler.uniform(-bound, bound)
    shift_y = sampler.uniform(-bound, bound)
    return matrix, torch.stack([shift_x, shift_y], 1)


def _draw_geometric(sampler: _Sampler, strengths: Strengths, matrix: Tensor) -> Tensor:
    """Scaling, rotation, anisotropic scaling along a random axis, and a sub-pixel translation.

    Returns `matrix` with these transforms appended, [B, 3, 3].
    """
    # Random numbers
    scale = 2 ** sampler.normal(strengths.scale_log2)
    aniso = 2 ** sampler.normal(strengths.aniso_log2)
    angle_before = sampler.uniform(-1, 1) * math.pi * 2 * strengths.rotate
    angle_after = sampler.uniform(-1, 1) * math.pi * 2 * strengths.rotate

    # The axis of the anisotropic scaling is `angle_before`; the full rotation is `angle_after`.
    matrix = matrix @ _scaling(scale, scale)
    matrix = matrix @ _rotation(angle_before)
    matrix = matrix @ _scaling(aniso, 1 / aniso)
    matrix = matrix @ _rotation(angle_after - angle_before)

    # The coordinates span 2, from −1 to 1: a fraction of the side is twice as much in them.
    shift_x = sampler.normal(2 * strengths.translate)
    shift_y = sampler.normal(2 * strengths.translate)
    return _translation(shift_x, shift_y) @ matrix


def _draw_color(sampler: _Sampler, strengths: Strengths) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast, brightness and saturation: (gain, offset, saturation), each [B, 1, 1, 1]."""
    gain = 2 ** sampler.normal(strengths.contrast_log2)
    offset = sampler.normal(strengths.brightness)
    saturation = 2 ** sampler.normal(strengths.saturation_log2)
    shape = (sampler.batch_size, 1, 1, 1)
    return gain.reshape(shape), offset.reshape(shape), saturation.reshape(shape)


def _draw_cutout(sampler: _Sampler, strengths: Strengths) -> Tensor:
    """A square of side `strengths.cutout` whose centre is uniform in the image: box [B, 4]."""
    x = sampler.uniform(0, 1)
    y = sampler.uniform(0, 1)
    half = strengths.cutout / 2
    return torch.stack([x - half, y - half, x + half, y + half], 1)


def apply_transform(
    x: Tensor, transform: Transform, resampling: ResamplingName = "bilinear"
) -> Tensor:
    """T(x), [B, C, h, w] float32, differentiable in `x`.

    The image is continued by reflection beyond its edges; the cutout is zero. `resampling` is that
    of `resample`. Moves by whole pixels keep every value: to the bit, but for "bilinear", whose
    rounding is about 1e-6.
    """
    x = x.float()
    original = x

    # Colour
    gain = transform.gain
    offset = transform.offset
    saturation = transform.saturation
    if saturation is not None and gain is not None and offset is not None:
        grey = x.mean(1, keepdim=True)
        x = (grey + (x - grey) * saturation) * gain + offset

    # Geometry
    if transform.matrix is not None:
        matrix = _add_pixel_shift(transform.matrix, transform.shift, x)
        if transform.moves_whole_pixels and resampling != "bilinear":
            x = _sample(x, matrix, "nearest")
        else:
            x = resample(x, matrix, resampling)

    # Cutout: a pixel is removed if its centre is inside the box
    if transform.box is not None:
        height, width = x.shape[2:]
        columns = (torch.arange(width, device=x.device) + 0.5) / width
        rows = (torch.arange(height, device=x.device) + 0.5) / height
        column = columns[None, None, None, :]
        row = rows[None, None, :, None]
        x0, y0, x1, y1 = transform.box[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
        inside_x = (column >= x0) & (column < x1)
        inside_y = (row >= y0) & (row < y1)
        kept = ~(inside_x & inside_y)
        x = x * kept.float()

    # Samples without a transform
    if transform.is_applied is not None:
        x = torch.where(transform.is_applied, x, original)

    return x


def resample(x: Tensor, matrix: Tensor, resampling: ResamplingName) -> Tensor:
    """`x` [B, C, h, w] float32 moved by `matrix` [B, 2, 3], an affine map of [−1, 1]² each.

    "bilinear" and "bicubic" sample x itself. "oversampled" doubles the resolution by a low-pass
    filter, samples that bilinearly, and returns by the filter's adjoint, as StyleGAN2-ADA does
    (Karras et al. 2020, appendix B.2). Bilinear sampling blurs: it keeps a third of the energy of
    white noise above a quarter of a cycle per pixel, oversampled half, bicubic two thirds
    (docs/results/resampling.json).
    """
    if resampling != "oversampled":
        return _sample(x, matrix, resampling)

    height, width = x.shape[2:]
    vertical = upsampling_matrix(height, x.device)
    horizontal = upsampling_matrix(width, x.device)
    x = vertical @ x @ horizontal.T  # [B, C, 2h, 2w]
    x = _sample(x, matrix, "bilinear")
    return (vertical.T @ x @ horizontal) / 4


def _sample(x: Tensor, matrix: Tensor, mode: str) -> Tensor:
    """`x` [B, C, h, w] at the positions that `matrix` [B, 2, 3] maps its pixels to."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="reflection", align_corners=False)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def upsampling_matrix(size: int, device: torch.device) -> Tensor:
    """`compute_upsampling_matrix`, once per size and device; a constant in a compiled graph."""
    return compute_upsampling_matrix(size, device)


@lru_cache(maxsize=32)
def compute_upsampling_matrix(size: int, device: torch.device) -> Tensor:
    """U [2·size, size]: ×2 upsampling of a line that is continued by reflection; UᵀU = 2·I.

    A symmetric low-pass filter whose amplitude is that of a Daubechies wavelet of order 6
    (Daubechies 1988), and so of the sym6 filter of StyleGAN2-ADA, but without its phase:

        |H(ω)|² = 4 (1 − s)⁶ Σ_{k<6} C(5 + k, k) sᵏ, s = sin²(ω/2)

    As |H(ω)|² + |H(ω + π)|² is constant, Uᵀ/2 undoes U exactly.
    """
    # Amplitude at the frequencies of the reflected line, which has a period of 4·size
    omega = 2 * math.pi * torch.fft.fftfreq(4 * size, dtype=torch.float64)
    s = (omega / 2).sin().square()
    series = torch.zeros_like(s)
    for k in range(6):
        series += math.comb(5 + k, k) * s**k
    amplitude = 2 * ((1 - s) ** 6 * series).sqrt()

    # Filter value at a distance in upsampled pixels; pixel k is centred between 2k and 2k + 1
    def filter_at(distance: Tensor) -> Tensor:
        return (amplitude * (omega * distance[..., None]).cos()).mean(-1)

    upsampled = torch.arange(2 * size, dtype=torch.float64)[:, None]
    pixel = torch.arange(size, dtype=torch.float64)[None, :]
    mirrored = 2 * size - 1 - pixel
    matrix = filter_at(upsampled - 2 * pixel - 0.5) + filter_at(upsampled - 2 * mirrored - 0.5)
    return matrix.float().to(device)


def _add_pixel_shift(matrix: Tensor, shift: Tensor | None, x: Tensor) -> Tensor:
    """`matrix` [B, 2, 3] with `shift`, rounded to integer pixels of `x` [B, C, h, w], added."""
    if shift is None:
        return matrix
    height, width = x.shape[2:]
    shift_x = (shift[:, 0] * width).round() / width
    shift_y = (shift[:, 1] * height).round() / height
    translation = 2 * torch.stack([shift_x, shift_y], 1)[:, :, None]  # [B, 2, 1]
    return matrix + F.pad(translation, (2, 0))


def _stack_matrix(rows: list[list[Tensor]]) -> Tensor:
    """[B, 3, 3] from nine tensors [B]."""
    stacked_rows = [torch.stack(row, -1) for row in rows]
    return torch.stack(stacked_rows, -2)


def _rotation(angle: Tensor) -> Tensor:
    """[B, 3, 3] rotation by `angle` [B] in radians."""
    cos = angle.cos()
    sin = angle.sin()
    zero = torch.zeros_like(angle)
    one = torch.ones_like(angle)
    return _stack_matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    """[B, 3, 3] scaling by `x` and `y` [B]."""
    zero = torch.zeros_like(x)
    one = torch.ones_like(x)
    return _stack_matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _translation(x: Tensor, y: Tensor) -> Tensor:
    """[B, 3, 3] translation by `x` and `y` [B]."""
    zero = torch.zeros_like(x)
    one = torch.ones_like(x)
    return _stack_matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])
