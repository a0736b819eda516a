"""Random transforms against known rotations, shifts and boxes, and their distributions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual import augment
from diffusion2gan.perceptual.augment import (
    Strengths,
    Transform,
    apply_transform,
    draw_transform,
    parse_families,
)


def image(batch: int = 1, channels: int = 4, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float32)


def test_a_rotation_by_90_degrees_is_rot90() -> None:
    x = image()
    rotated = apply_transform(x, Transform(matrix=matrix([0, -1, 0], [1, 0, 0])))
    torch.testing.assert_close(rotated, torch.rot90(x, 1, (2, 3)), rtol=0, atol=1e-5)


def test_a_negative_x_scale_is_a_horizontal_flip() -> None:
    x = image()
    torch.testing.assert_close(
        apply_transform(x, Transform(matrix=matrix([-1, 0, 0], [0, 1, 0]))),
        x.flip(3),
        rtol=0,
        atol=1e-5,
    )


def test_an_integer_translation_shifts_and_reflects_at_the_edge() -> None:
    x = image()
    moved = apply_transform(x, Transform(matrix=matrix([1, 0, 2 * 2 / 8], [0, 1, -2 * 1 / 8])))
    torch.testing.assert_close(moved[:, :, 1:, :-2], x[:, :, :-1, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[:, :, 1:, -2:], x[:, :, :-1, [7, 6]], rtol=0, atol=1e-5)


def test_blit_is_a_flip_a_rotation_by_90_degrees_and_an_integer_shift() -> None:
    x = image(1, size=16)
    outputs = apply_transform(x.expand(200, -1, -1, -1), draw_transform(200, ("blit",), rng()))

    # The central 4×4 pixels after each of 8 orientations and 25 shifts
    centres = []
    for flipped in (x, x.flip(3)):
        for quarter in range(4):
            rotated = torch.rot90(flipped, quarter, (2, 3))
            for dy in range(-2, 3):
                for dx in range(-2, 3):
                    centres.append(rotated[0, :, 6 + dy : 10 + dy, 6 + dx : 10 + dx])

    # Every output is one of them, and each orientation and each shift occurs
    errors = outputs[:, None, :, 6:10, 6:10] - torch.stack(centres)
    errors = errors.abs().amax((2, 3, 4))
    assert float(errors.min(1).values.max()) < 1e-4
    nearest = errors.argmin(1)
    assert set((nearest // 25).tolist()) == set(range(8))
    assert len(set((nearest % 25).tolist())) == 25


def test_cutout_is_a_zero_square_of_its_side() -> None:
    x = torch.ones(1, 3, 16, 16)
    cut = apply_transform(x, Transform(box=torch.tensor([[0.25, 0.0, 0.75, 0.5]])))
    expected = x.clone()
    expected[:, :, 0:8, 4:12] = 0
    assert torch.equal(cut, expected)

    # Drawn boxes: 8×8 pixels, less at the edges of the image but at least half of a side
    ones = torch.ones(500, 1, 16, 16)
    zero = apply_transform(ones, draw_transform(500, ("cutout",), rng()))[:, 0] == 0
    height, width = zero.any(2).sum(1), zero.any(1).sum(1)
    assert torch.equal(zero.sum((1, 2)), height * width)
    assert int(height.max()) == int(width.max()) == 8
    assert int(height.min()) in (4, 5)

    # A side of a quarter: at most 4×4 pixels
    small = Strengths(cutout=0.25)
    outputs = apply_transform(ones, draw_transform(500, ("cutout",), rng(), small))
    assert int((outputs == 0).sum((1, 2, 3)).max()) == 16


def test_geometric_has_the_distributions_of_stylegan2_ada() -> None:
    drawn = draw_transform(4000, ("geometric",), rng())
    assert drawn.matrix is not None and drawn.shift is None
    m = drawn.matrix.double()
    linear, shift = m[:, :, :2], m[:, :, 2]

    # log2 of the isotropic scale ~ N(0, 0.2)
    log2_scale = linear.det().abs().log2() / 2
    assert stats.kstest(log2_scale.numpy(), "norm", args=(0, 0.2)).pvalue > 1e-3

    # log2 of the anisotropic scale ~ |N(0, 0.2)|
    singular = torch.linalg.svdvals(linear)
    log2_aniso = (singular[:, 0] / singular[:, 1]).log2() / 2
    assert stats.kstest(log2_aniso.numpy(), "halfnorm", args=(0, 0.2)).pvalue > 1e-3

    # Translation ~ N(0, 0.125) of the side, which is 2 in these coordinates
    for axis in range(2):
        assert stats.kstest((shift[:, axis] / 2).numpy(), "norm", args=(0, 0.125)).pvalue > 1e-3

    # Rotation: any angle
    u, _, vh = torch.linalg.svd(linear)
    angle = torch.atan2((u @ vh)[:, 1, 0], (u @ vh)[:, 0, 0])
    assert stats.kstest(angle.numpy(), "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-3


def test_color_has_its_distributions_and_formula() -> None:
    drawn = draw_transform(4000, ("color",), rng())
    assert drawn.gain is not None and drawn.offset is not None and drawn.saturation is not None
    log2_gain, offset = drawn.gain.flatten().log2(), drawn.offset.flatten()
    log2_saturation = drawn.saturation.flatten().log2()
    assert stats.kstest(log2_gain.numpy(), "norm", args=(0, 0.5)).pvalue > 1e-3
    assert stats.kstest(offset.numpy(), "norm", args=(0, 0.2)).pvalue > 1e-3
    assert stats.kstest(log2_saturation.numpy(), "norm", args=(0, 1)).pvalue > 1e-3

    x = image()
    y = apply_transform(
        x,
        Transform(
            gain=torch.full((1, 1, 1, 1), 2.0),
            offset=torch.full((1, 1, 1, 1), 0.5),
            saturation=torch.zeros(1, 1, 1, 1),
        ),
    )
    torch.testing.assert_close(y, (x.mean(1, keepdim=True) * 2 + 0.5).expand_as(x))


EACH_FAMILY_AND_ALL = [
    *[(family,) for family in augment.TRANSFORM_FAMILIES],
    augment.TRANSFORM_FAMILIES,
]


@pytest.mark.parametrize("families", EACH_FAMILY_AND_ALL)
def test_a_sample_does_not_depend_on_the_other_samples(families: tuple[str, ...]) -> None:
    x, drawn = image(5), draw_transform(5, families, rng())
    together = apply_transform(x, drawn)
    for i in range(5):
        row = slice(i, i + 1)
        alone = apply_transform(x[row], drawn.select(row))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)

    # Each sample has another transform
    for i in range(5):
        for j in range(i):
            if drawn.box is not None:
                assert not torch.equal(drawn.box[i], drawn.box[j])
            else:
                assert not torch.equal(together[i], together[j])


def test_no_families_or_zero_strengths_are_the_identity() -> None:
    x = image()
    assert torch.equal(apply_transform(x, draw_transform(1, (), rng())), x)
    still = Strengths(0, 0, 0, 0, 0, 0, 0, 0, 0)
    drawn = draw_transform(3, ("geometric", "color", "cutout"), rng(), still)
    torch.testing.assert_close(apply_transform(image(3), drawn), image(3), rtol=0, atol=1e-5)


def test_half_precision_is_converted_to_float32() -> None:
    x, drawn = image(2).bfloat16(), draw_transform(2, augment.TRANSFORM_FAMILIES, rng())
    out = apply_transform(x, drawn)
    assert out.dtype == torch.float32 and torch.equal(out, apply_transform(x.float(), drawn))


def test_gradients_reach_the_input() -> None:
    x = image(2).requires_grad_()
    apply_transform(x, draw_transform(2, ("geometric",), rng())).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_families_are_parsed_and_a_misspelt_one_is_refused_with_a_suggestion() -> None:
    assert parse_families("geometric+cutout") == ("geometric", "cutout")
    assert parse_families("") == ()
    with pytest.raises(UserError, match="'geometrc'; did you mean 'geometric'"):
        parse_families("cutout+geometrc")
