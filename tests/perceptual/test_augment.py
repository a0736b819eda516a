"""Random transforms against known turns, shifts and boxes, and their statistics."""

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


def picture(batch: int = 1, channels: int = 4, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float32)


def test_a_quarter_turn_is_rot90() -> None:
    x = picture()
    turned = apply_transform(x, Transform(matrix=matrix([0, -1, 0], [1, 0, 0])))
    torch.testing.assert_close(turned, torch.rot90(x, 1, (2, 3)), rtol=0, atol=1e-5)


def test_a_flip_is_a_flip() -> None:
    x = picture()
    torch.testing.assert_close(
        apply_transform(x, Transform(matrix=matrix([-1, 0, 0], [0, 1, 0]))),
        x.flip(3),
        rtol=0,
        atol=1e-5,
    )


def test_a_whole_pixel_translation_shifts_and_mirrors() -> None:
    x = picture()
    moved = apply_transform(x, Transform(matrix=matrix([1, 0, 2 * 2 / 8], [0, 1, -2 * 1 / 8])))
    torch.testing.assert_close(moved[:, :, 1:, :-2], x[:, :, :-1, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[:, :, 1:, -2:], x[:, :, :-1, [7, 6]], rtol=0, atol=1e-5)


def test_blit_gives_whole_pixels_only() -> None:
    """Every output of blit is a flip and a quarter turn of the input, moved by whole pixels and mirrored outside."""
    x = picture(1, size=16)
    many = apply_transform(x.expand(200, -1, -1, -1), draw_transform(200, ("blit",), rng()))
    ways = [torch.rot90(y, k, (2, 3)) for y in (x, x.flip(3)) for k in range(4)]
    middles = torch.stack(
        [
            w[0, :, 6 + dy : 10 + dy, 6 + dx : 10 + dx]
            for w in ways
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        ]
    )
    errors = (many[:, None, :, 6:10, 6:10] - middles).abs().amax((2, 3, 4))
    assert float(errors.min(1).values.max()) < 1e-4
    seen = errors.argmin(1)
    assert set((seen // 25).tolist()) == set(range(8)) and len(set((seen % 25).tolist())) == 25


def test_the_cutout_is_a_zero_box_of_its_size() -> None:
    x = torch.ones(1, 3, 16, 16)
    cut = apply_transform(x, Transform(box=torch.tensor([[0.25, 0.0, 0.75, 0.5]])))
    expected = x.clone()
    expected[:, :, 0:8, 4:12] = 0
    assert torch.equal(cut, expected)
    many = apply_transform(torch.ones(500, 1, 16, 16), draw_transform(500, ("cutout",), rng()))
    zero = many[:, 0] == 0
    height, width = zero.any(2).sum(1), zero.any(1).sum(1)
    assert torch.equal(zero.sum((1, 2)), height * width)  # a box
    assert int(height.max()) == int(width.max()) == 8 and int(height.min()) in (4, 5)
    inside = Strengths(cutout=0.25)
    many = apply_transform(
        torch.ones(500, 1, 16, 16), draw_transform(500, ("cutout",), rng(), inside)
    )
    assert int((many == 0).sum((1, 2, 3)).max()) == 16


def test_geometrics_numbers_are_stylegan2_adas() -> None:
    drawn = draw_transform(4000, ("geometric",), rng())
    assert drawn.matrix is not None and drawn.shift is None
    m = drawn.matrix.double()
    linear, shift = m[:, :, :2], m[:, :, 2]
    size = linear.det().abs().log2() / 2  # the isotropic part: log2 scale ~ N(0, 0.2)
    assert stats.kstest(size.numpy(), "norm", args=(0, 0.2)).pvalue > 1e-3
    singular = torch.linalg.svdvals(linear)
    aniso = (singular[:, 0] / singular[:, 1]).log2() / 2  # |N(0, 0.2)|
    assert stats.kstest(aniso.numpy(), "halfnorm", args=(0, 0.2)).pvalue > 1e-3
    for axis in range(2):  # a share of the side: half of the coordinate
        assert stats.kstest((shift[:, axis] / 2).numpy(), "norm", args=(0, 0.125)).pvalue > 1e-3
    u, _, vh = torch.linalg.svd(linear)
    turn = torch.atan2((u @ vh)[:, 1, 0], (u @ vh)[:, 0, 0])
    assert stats.kstest(turn.numpy(), "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-3


def test_colours_numbers() -> None:
    drawn = draw_transform(4000, ("color",), rng())
    assert drawn.gain is not None and drawn.offset is not None and drawn.saturation is not None
    assert stats.kstest(drawn.gain.flatten().log2().numpy(), "norm", args=(0, 0.5)).pvalue > 1e-3
    assert stats.kstest(drawn.offset.flatten().numpy(), "norm", args=(0, 0.2)).pvalue > 1e-3
    assert (
        stats.kstest(drawn.saturation.flatten().log2().numpy(), "norm", args=(0, 1)).pvalue > 1e-3
    )
    x = picture()
    y = apply_transform(
        x,
        Transform(
            gain=torch.full((1, 1, 1, 1), 2.0),
            offset=torch.full((1, 1, 1, 1), 0.5),
            saturation=torch.zeros(1, 1, 1, 1),
        ),
    )
    torch.testing.assert_close(y, (x.mean(1, keepdim=True) * 2 + 0.5).expand_as(x))


@pytest.mark.parametrize("families", [*[(f,) for f in augment.FAMILIES], augment.FAMILIES])
def test_a_sample_does_not_see_its_neighbours(families: tuple[str, ...]) -> None:
    x, drawn = picture(5), draw_transform(5, families, rng())
    together = apply_transform(x, drawn)
    for i in range(5):
        alone = Transform(*(None if v is None else v[i : i + 1] for v in vars(drawn).values()))
        torch.testing.assert_close(
            apply_transform(x[i : i + 1], alone)[0], together[i], rtol=0, atol=1e-6
        )
    assert (
        len(
            {
                tuple(t.flatten().tolist())
                for t in (drawn.box if drawn.box is not None else together)
            }
        )
        == 5
    )


def test_all_families_off_is_the_identity() -> None:
    x = picture()
    assert torch.equal(apply_transform(x, draw_transform(1, (), rng())), x)
    still = Strengths(0, 0, 0, 0, 0, 0, 0, 0, 0)
    drawn = draw_transform(3, ("geometric", "color", "cutout"), rng(), still)
    torch.testing.assert_close(apply_transform(picture(3), drawn), picture(3), rtol=0, atol=1e-5)


def test_half_precision_is_raised_to_float32() -> None:
    x, drawn = picture(2).bfloat16(), draw_transform(2, augment.FAMILIES, rng())
    out = apply_transform(x, drawn)
    assert out.dtype == torch.float32 and torch.equal(out, apply_transform(x.float(), drawn))


def test_gradients_flow() -> None:
    x = picture(2).requires_grad_()
    apply_transform(x, draw_transform(2, ("geometric",), rng())).square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_families_are_parsed_and_the_nearest_is_named() -> None:
    assert (
        parse_families("geometric+cutout") == ("geometric", "cutout") and parse_families("") == ()
    )
    with pytest.raises(UserError, match="'geometrc'; did you mean 'geometric'"):
        parse_families("cutout+geometrc")
