"""Graded distortions: error and judgement follow the grade; files are read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.triplets import open_triplets, read_triplet
from diffusion2gan.pocket import scenes
from diffusion2gan.pocket.triplets import (
    DISTORTIONS,
    SUBSETS,
    blur,
    displace,
    distort,
    make_triplet,
    write_triplets,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", DISTORTIONS)
def test_a_higher_grade_has_a_larger_error(family: str) -> None:
    image = scenes.draw([3], 90).images[0]
    errors = [
        float((distort(image, family, grade, rng()) - image).square().mean())
        for grade in (0, 0.2, 0.5, 1)
    ]
    assert errors[0] < 1e-9 and errors[0] < errors[1] < errors[2] < errors[3]


@pytest.mark.parametrize("subset", DISTORTIONS)
def test_the_judgement_follows_the_grades(subset: str) -> None:
    """With one family and direction, the less distorted image nearly always has a smaller error."""
    num_agreeing = 0
    judgements = set()
    for number in range(20):
        triplet = make_triplet(number, subset, seed=1)
        error0 = (triplet.p0 - triplet.ref).square().mean()
        error1 = (triplet.p1 - triplet.ref).square().mean()
        num_agreeing += int(bool(error1 < error0) == bool(triplet.judge))
        judgements.add(triplet.judge)
    assert num_agreeing >= 18 and judgements == {0.0, 1.0}


def test_a_triplet_is_a_function_of_number_subset_and_seed() -> None:
    first, second = make_triplet(5, "mixed", seed=0), make_triplet(5, "mixed", seed=0)
    assert torch.equal(first.p0, second.p0) and torch.equal(first.p1, second.p1)
    assert first.judge == second.judge
    other = make_triplet(5, "mixed", seed=1)
    assert not torch.equal(first.p0, other.p0)


def test_blur_is_a_gaussian() -> None:
    image = torch.zeros(3, 41, 41)
    image[:, 20, 20] = 1.0
    axis = torch.arange(41) - 20.0
    expected = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 2.0**2))
    torch.testing.assert_close(blur(image, 2.0)[1], expected / expected.sum(), rtol=0, atol=1e-4)


def test_displacing_by_integer_pixels_shifts() -> None:
    image = scenes.draw([0], 90).images[0]
    moved = displace(image, torch.tensor([2.0, -1.0])[:, None, None].expand(2, 64, 64))
    torch.testing.assert_close(moved[:, 1:, :-2], image[:, :-1, 2:], rtol=0, atol=1e-4)


def test_written_triplets_are_read_back(tmp_path: Path) -> None:
    write_triplets(tmp_path, 2, seed=3)
    opened = open_triplets(tmp_path)
    assert opened.subsets == sorted(SUBSETS) and len(opened.refs) == 2 * len(SUBSETS)
    for i, (number, ref) in enumerate(zip(opened.subset, opened.refs, strict=True)):
        rows = read_triplet(opened, i, 64)
        triplet = make_triplet(int(ref.stem), opened.subsets[number], seed=3)
        assert float(rows["judge"]) == triplet.judge
        for name in ("ref", "p0", "p1"):
            image = rows[name].float() / 127.5 - 1
            torch.testing.assert_close(image, getattr(triplet, name), rtol=0, atol=0.5 / 127)


def test_triplets_are_only_written_to_a_folder_of_their_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "blur").mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"contains no triplets of this command .* another --out"):
        write_triplets(mine, 1, seed=0)
    assert sorted(path.name for path in mine.rglob("*")) == ["blur", "thesis.txt"]

    # An empty folder is used, and a set continued, but not with another seed
    own = tmp_path / "own"
    own.mkdir()
    write_triplets(own, 1, seed=0)
    write_triplets(own, 2, seed=0)
    assert len(open_triplets(own).refs) == 2 * len(SUBSETS)
    with pytest.raises(UserError, match="was made with seed = 0, but this command has 1"):
        write_triplets(own, 2, seed=1)
