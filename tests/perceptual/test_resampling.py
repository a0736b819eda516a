"""The transforms' resampling by frequency against an independent reference, and their share."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import (
    TRANSFORM_FAMILIES,
    BatchRows,
    Transform,
    TransformSettings,
    apply_transform,
    draw_transform,
    resample,
    upsampling_matrix,
)
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.recipe import ResamplingName

RESAMPLINGS: tuple[ResamplingName, ...] = get_args(ResamplingName)
CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def white(*shape: int) -> Tensor:
    return torch.randn(shape, generator=rng(7))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module benchmarks/resampling.py, which has the reference."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("resampling")


def test_energy_by_frequency_is_that_of_the_independent_low_pass(benchmark: Any) -> None:
    x = white(32, 1, 64, 64)
    matrix = draw_transform(32, ("geometric",), rng()).matrix
    rows = {
        name: benchmark.measure_spectrum(move, x, matrix)
        for name, move in benchmark.resamplers().items()
    }

    # ×2 oversampling: within 0.02 at every frequency
    expected = rows[benchmark.REFERENCE]
    np.testing.assert_allclose(
        rows["oversampled"]["amplitudes"], expected["amplitudes"], rtol=0, atol=0.02
    )

    # Fine energy of white latents: 36 % by bilinear sampling, 51 % by the low-pass
    fine = {name: row["fine_energy"] for name, row in rows.items()}
    assert fine["bilinear"] == pytest.approx(0.36, abs=0.03)
    assert fine[benchmark.REFERENCE] == pytest.approx(0.51, abs=0.03)
    assert fine["oversampled"] == pytest.approx(fine[benchmark.REFERENCE], abs=0.01)
    assert 0.6 < fine["bicubic"] < 0.7


def test_the_reference_filter_is_an_orthonormal_wavelet_of_order_six(benchmark: Any) -> None:
    taps = benchmark.SYM6
    for shift in range(6):
        product = float(taps[: 12 - 2 * shift] @ taps[2 * shift :])
        assert product == pytest.approx(float(shift == 0), abs=1e-9)
    # Six zeros at the highest frequency
    signs = (-1.0) ** np.arange(12)
    for moment in range(6):
        assert float((signs * np.arange(12) ** moment) @ taps) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_upsampling_is_undone_by_its_adjoint_and_keeps_constants(size: int) -> None:
    matrix = upsampling_matrix(size, CPU)
    torch.testing.assert_close(matrix.T @ matrix / 2, torch.eye(size), rtol=0, atol=1e-6)
    torch.testing.assert_close(matrix.sum(1), torch.ones(2 * size), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resampling", ["bicubic", "oversampled"])
def test_moves_by_whole_pixels_are_exact(resampling: ResamplingName) -> None:
    """Flips, quarter rotations and shifts keep every value to the bit, reflected at the edges."""
    x = white(1, 4, 16, 16)
    drawn = draw_transform(100, ("blit",), rng())
    moved = apply_transform(x.expand(100, -1, -1, -1), drawn, resampling)
    assert drawn.shift is not None and drawn.matrix is not None

    for i in range(100):
        dx, dy = (16 * drawn.shift[i]).round().int().tolist()
        # The image with its reflection, moved by slicing, then turned by known 90° rotations
        quarters = (x, torch.rot90(x, 1, (2, 3)), torch.rot90(x, 2, (2, 3)), x.rot90(3, (2, 3)))
        candidates = [*quarters, *[image.flip(3) for image in quarters]]
        matches = 0
        for candidate in candidates:
            wide = torch.cat([candidate.flip(3), candidate, candidate.flip(3)], 3)
            full = torch.cat([wide.flip(2), wide, wide.flip(2)], 2)
            for sign_x, sign_y, swap in SHIFT_SIGNS:
                sx, sy = (dy, dx) if swap else (dx, dy)
                sx, sy = sign_x * sx, sign_y * sy
                crop = full[:, :, 16 + sy : 32 + sy, 16 + sx : 32 + sx]
                matches += int(torch.equal(crop[0], moved[i]))
        assert matches > 0, (i, dx, dy)


SHIFT_SIGNS = [(x, y, swap) for x in (-1, 1) for y in (-1, 1) for swap in (False, True)]


@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_no_move_is_exact_and_quarter_rotations_are(resampling: ResamplingName) -> None:
    x = white(2, 4, 16, 12)
    identity = torch.eye(2, 3).expand(2, 2, 3)
    torch.testing.assert_close(resample(x, identity, resampling), x, rtol=0, atol=1e-5)
    square = white(2, 4, 16, 16)
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0]]).expand(2, 2, 3)
    expected = torch.rot90(square, 1, (2, 3))
    torch.testing.assert_close(resample(square, turn, resampling), expected, rtol=0, atol=1e-5)


def test_bilinear_is_the_default_and_consumes_the_same_random_numbers() -> None:
    """The value of a seed as it was before there were choices."""
    x = white(4, 4, 16, 16)
    drawn = draw_transform(4, TRANSFORM_FAMILIES, rng(3))
    assert drawn.matrix is not None and drawn.box is not None and drawn.is_applied is None
    assert torch.equal(apply_transform(x, drawn), apply_transform(x, drawn, "bilinear"))
    shared = draw_transform(4, TRANSFORM_FAMILIES, rng(3), share=0.5)
    assert torch.equal(drawn.matrix, shared.matrix)  # type: ignore[arg-type]
    assert torch.equal(drawn.box, shared.box)  # type: ignore[arg-type]


def random_network() -> tuple[VGG, list[Tensor]]:
    vgg = VGG(4, (4, 8, 8, 8, 8), 2)
    return vgg, [torch.rand(width) for width in vgg.config["widths"]]


def test_a_share_of_the_samples_is_transformed_and_the_others_are_not() -> None:
    x = white(4000, 1, 4, 4)
    settings = TransformSettings(("geometric", "cutout"), share=0.3)
    drawn = settings.draw(4000, rng(), "cpu")
    moved = apply_transform(x, drawn)
    unchanged = (moved == x).all(3).all(2).all(1)
    assert drawn.is_applied is not None
    assert torch.equal(unchanged, ~drawn.is_applied.flatten())
    assert float(unchanged.float().mean()) == pytest.approx(0.7, abs=0.03)

    # Each draw of an ensemble decides anew
    distance = ELatentLPIPS(*random_network(), transform_share=0.5, num_draws=2)
    plain = LatentLPIPS(*distance._frozen)
    a, b = white(64, 4, 16, 16), white(64, 4, 16, 16).flip(0)
    same = int(torch.isclose(distance(a, b, rng()), plain(a, b)).sum())
    assert 5 < same < 30  # a quarter of 64 has no transform in either draw


@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_micro_batches_change_neither_transforms_nor_their_share(
    resampling: ResamplingName,
) -> None:
    distance = ELatentLPIPS(
        *random_network(),
        transforms="blit+geometric+cutout",
        resampling=resampling,
        transform_share=0.5,
    )
    a, b = white(8, 4, 16, 16), white(8, 4, 16, 16).flip(0)
    expected = distance(a, b, rng(5))
    for rows in (slice(0, 2), slice(2, 8)):
        found = distance(a[rows], b[rows], rng(5), BatchRows(rows, 8))
        torch.testing.assert_close(found, expected[rows], rtol=1e-5, atol=1e-7)


def test_oversampling_compiles_to_one_graph() -> None:
    distance = ELatentLPIPS(*random_network(), resampling="oversampled", transform_share=0.5)
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")
    a, b = white(3, 4, 16, 16).requires_grad_(), white(3, 4, 16, 16).flip(0)
    values = []
    for function in (distance, compiled):
        torch.manual_seed(3)
        value = function(a, b)
        (gradient,) = torch.autograd.grad(value.sum(), a)
        values.append((value.detach(), gradient))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)


def test_wrong_settings_are_refused() -> None:
    network = random_network()
    with pytest.raises(UserError, match=r"transform_share = 0: .* above 0 and at most 1"):
        ELatentLPIPS(*network, transform_share=0)
    with pytest.raises(UserError, match=r"resampling = 'bicubik': .*did you mean 'bicubic'"):
        ELatentLPIPS(*network, resampling="bicubik")  # type: ignore[arg-type]


def test_transforms_of_selected_samples_are_theirs() -> None:
    drawn = draw_transform(6, TRANSFORM_FAMILIES, rng(), share=0.5)
    x = white(6, 4, 8, 8)
    rows = torch.tensor([4, 1])
    expected = apply_transform(x, drawn, "oversampled")[rows]
    found = apply_transform(x[rows], drawn.select(rows), "oversampled")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert isinstance(drawn.select(rows), Transform)
