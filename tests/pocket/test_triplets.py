"""Graded distortions: 0 changes nothing, more is further, the judgement follows the grade; files say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.perceptual.triplets import open_triplets, read_triplet
from diffusion2gan.pocket import scenes
from diffusion2gan.pocket.triplets import (
    FAMILIES,
    SUBSETS,
    blur,
    displace,
    distort,
    make_triplet,
    write_triplets,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_higher_grade_is_further(family: str) -> None:
    image = scenes.draw([3], 90).images[0]
    errors = [
        float((distort(image, family, grade, rng()) - image).square().mean())
        for grade in (0, 0.2, 0.5, 1)
    ]
    assert errors[0] < 1e-9 and errors[0] < errors[1] < errors[2] < errors[3]


@pytest.mark.parametrize("subset", FAMILIES)
def test_the_judgement_is_the_grades(subset: str) -> None:
    """Of two that go the same way the nearer in squared error is the less distorted, nearly always."""
    right, judges = 0, set()
    for number in range(20):
        made = make_triplet(number, subset, 1)
        e0, e1 = ((p - made.ref).square().mean() for p in (made.p0, made.p1))
        right += (e1 < e0) == bool(made.judge)
        judges.add(made.judge)
    assert right >= 18 and judges == {0.0, 1.0}


def test_a_triplet_depends_on_its_number_alone() -> None:
    one, again, other = (
        make_triplet(5, "mixed", 0),
        make_triplet(5, "mixed", 0),
        make_triplet(5, "mixed", 1),
    )
    assert (
        torch.equal(one.p0, again.p0) and torch.equal(one.p1, again.p1) and one.judge == again.judge
    )
    assert not torch.equal(one.p0, other.p0)


def test_blur_is_a_gaussian() -> None:
    image = torch.zeros(3, 41, 41)
    image[:, 20, 20] = 1.0
    axis = torch.arange(41) - 20.0
    expected = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 2.0**2))
    torch.testing.assert_close(blur(image, 2.0)[1], expected / expected.sum(), rtol=0, atol=1e-4)


def test_displacing_by_whole_pixels_shifts() -> None:
    image = scenes.draw([0], 90).images[0]
    moved = displace(image, torch.tensor([2.0, -1.0])[:, None, None].expand(2, 64, 64))
    torch.testing.assert_close(moved[:, 1:, :-2], image[:, :-1, 2:], rtol=0, atol=1e-4)


def test_files_hold_what_was_made(tmp_path: Path) -> None:
    write_triplets(tmp_path, 2, seed=3)
    opened = open_triplets(tmp_path)
    assert opened.subsets == sorted(SUBSETS) and len(opened.refs) == 2 * len(SUBSETS)
    for i, (number, ref) in enumerate(zip(opened.subset, opened.refs, strict=True)):
        rows, made = (
            read_triplet(opened, i, 64),
            make_triplet(int(ref.stem), opened.subsets[number], 3),
        )
        assert float(rows["judge"]) == made.judge
        for part in ("ref", "p0", "p1"):
            torch.testing.assert_close(
                rows[part].float() / 127.5 - 1, getattr(made, part), rtol=0, atol=0.5 / 127
            )
