"""The pocket world: pure in (seed, index); captions, labels and images agree."""

from __future__ import annotations

import math
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion2gan.pocket import models, scenes

MANY = range(2400)
# Colours whose shading never clips: light and shadow scale a pixel's RGB vector but keep its
# direction.
TRUE_HUES = ("red", "green", "cyan", "blue", "purple")


@pytest.fixture(scope="module")
def many() -> scenes.Scenes:
    """Labels and captions of thousands of images; the images themselves are 4×4."""
    return scenes.draw(MANY, seed=7, image_size=4)


def phrases(caption: str) -> list[list[str]]:
    """An independent parser: the words after each article up to the shape."""
    found = []
    for text in re.split(r"\ban? ", caption)[1:]:
        words = text.replace(",", " ").split()
        shape = next(i for i, word in enumerate(words) if word in scenes.SHAPES)
        found.append(words[: shape + 1])
    return found


def has_tone(colour: str, image: Tensor) -> Tensor:
    """[H, W] bool: where the image [3, H, W] has exactly this colour, at any brightness."""
    rgb = torch.tensor(scenes.COLOURS[colour])[:, None, None]
    return torch.cosine_similarity((image + 1) / 2, rgb, dim=0) > 0.9995


def test_an_image_is_a_function_of_seed_and_index() -> None:
    batch = scenes.draw(range(12), seed=3)
    again = scenes.draw(range(12), seed=3)
    assert torch.equal(batch.images, again.images) and batch.captions == again.captions
    other = scenes.draw(range(12), seed=4)
    assert other.captions != batch.captions
    assert (other.images - batch.images).abs().mean(dim=(1, 2, 3)).min() > 0.02


def test_an_image_does_not_depend_on_its_batch() -> None:
    batch = scenes.draw(range(12), seed=3)
    for index in (0, 5, 11):
        alone = scenes.draw([index], seed=3)
        torch.testing.assert_close(alone.images[0], batch.images[index], rtol=0, atol=1e-5)
        assert alone.captions == [batch.captions[index]]
    backwards = scenes.draw(range(11, -1, -1), seed=3)
    torch.testing.assert_close(backwards.images.flip(0), batch.images, rtol=0, atol=1e-5)
    assert torch.equal(backwards.shape.flip(0), batch.shape)


def test_images_have_expected_shape_range_and_contrast() -> None:
    images = scenes.draw(range(64), seed=0).images
    assert images.shape == (64, 3, 64, 64) and images.dtype == torch.float32
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1
    assert images.amax() > 0.8 and images.amin() < -0.6 and images.std(dim=(1, 2, 3)).min() > 0.05
    assert scenes.draw([0], seed=0, image_size=40).images.shape == (1, 3, 40, 40)


def test_captions_are_the_same_without_painting(many: scenes.Scenes) -> None:
    assert scenes.captions(MANY, seed=7) == many.captions


def test_labels_are_in_range_and_about_equally_frequent(many: scenes.Scenes) -> None:
    exists = torch.arange(3) < many.count[:, None]
    assert set(many.count.tolist()) == {1, 2, 3} and set(many.ground.tolist()) == set(
        range(len(scenes.GROUNDS))
    )

    names = {
        "shape": scenes.SHAPES,
        "colour": scenes.COLOURS,
        "pattern": scenes.PATTERNS,
        "size": scenes.SIZES,
    }
    for field, known in names.items():
        label = getattr(many, field)
        assert label.dtype == torch.int64 and (label[~exists] == -1).all()
        counted = torch.bincount(label[exists], minlength=len(known)).double()
        assert (counted / counted.mean() - 1).abs().max() < 0.2, field


def test_parsed_captions_agree_with_the_labels(many: scenes.Scenes) -> None:
    not_mentioned: dict[str, int] = defaultdict(int)
    for i, caption in enumerate(many.captions):
        content = scenes.parse_caption(caption)
        assert content.count == int(many.count[i])
        for k in range(content.count):
            assert content.shape[k] == scenes.SHAPES[many.shape[i, k]]
            assert content.colour[k] in (None, list(scenes.COLOURS)[many.colour[i, k]])
            assert content.pattern[k] in (None, scenes.PATTERNS[many.pattern[i, k]])
            not_mentioned["colour"] += content.colour[k] is None
            not_mentioned["pattern"] += content.pattern[k] is None
        assert content.ground in (None, list(scenes.GROUNDS)[many.ground[i]])
        not_mentioned["ground"] += content.ground is None

    # How often an attribute is not mentioned, within four standard errors
    objects = int(many.count.sum())
    for kind, share, total in (
        ("colour", 0.08, objects),
        ("pattern", 0.25, objects),
        ("ground", 0.1, len(MANY)),
    ):
        assert not_mentioned[kind] / total == pytest.approx(
            share, abs=4 * math.sqrt(share * (1 - share) / total)
        ), kind


def test_parsed_captions_agree_with_an_independent_parser(many: scenes.Scenes) -> None:
    for i, caption in enumerate(many.captions):
        content = scenes.parse_caption(caption)
        read = phrases(caption)
        assert tuple(words[-1] for words in read) == content.shape
        assert (
            tuple(next((w for w in words if w in scenes.COLOURS), None) for words in read)
            == content.colour
        )
        assert (
            tuple(next((w for w in words if w in scenes.PATTERNS), None) for words in read)
            == content.pattern
        )

        for k, words in enumerate(read):
            size = next((w for w in words if w in scenes.SIZES), None)
            assert size in (None, scenes.SIZES[many.size[i, k]])


@pytest.mark.parametrize(
    "caption", ["a red dragon", "a red ring and a teapot on pink", "", "red on pink", "ring!x"]
)
def test_unknown_captions_are_rejected_with_their_unknown_words(caption: str) -> None:
    with pytest.raises(ValueError, match="not a caption of the pocket world") as error:
        scenes.parse_caption(caption)
    strange = [word for word in ("dragon", "teapot") if word in caption]
    assert all(word in str(error.value).split("unknown:")[1] for word in strange)


def test_every_word_of_the_captions_is_in_words(many: scenes.Scenes) -> None:
    used = {word for caption in many.captions for word in re.findall(r"[^\s,]+|,", caption)}
    assert used == set(scenes.WORDS) and len(scenes.WORDS) == len(set(scenes.WORDS))


def test_articles_match_the_following_word(many: scenes.Scenes) -> None:
    for caption in many.captions:
        for article, word in re.findall(r"\b(an?) (\w+)", caption):
            assert article == ("an" if word[0] in "aeiou" else "a"), caption


def test_the_longest_caption_fits_the_tokenizer(many: scenes.Scenes) -> None:
    phrase = "a large checkered purple triangle"
    longest = [
        form.format(*[phrase] * count) + " on lilac"
        for count, forms in scenes.RELATIONS.items()
        for form in forms
    ]
    lengths = [len(re.findall(r"[a-z]+|,", caption)) for caption in (*longest, *many.captions)]
    assert max(lengths) == max(lengths[: len(longest)]) <= models.MAX_LENGTH - 2
    for caption in longest:
        assert scenes.parse_caption(caption).ground == "lilac"


def test_a_caption_does_not_determine_the_image() -> None:
    indices = defaultdict(list)
    for index, caption in enumerate(scenes.captions(range(3000), seed=0)):
        if len(phrases(caption)) == 1:
            indices[caption].append(index)
    twins = [found[:2] for found in indices.values() if len(found) > 1][:8]
    assert len(twins) == 8
    first, second = (scenes.draw(list(side), seed=0) for side in zip(*twins, strict=True))
    assert first.captions == second.captions
    assert (first.images - second.images).abs().mean(dim=(1, 2, 3)).min() > 0.02


def measure_centres(
    many: scenes.Scenes, words: str, limit: int
) -> list[tuple[list[str], np.ndarray]]:
    """Colours and centroids (x right, y down) of the objects in images with `words` in the caption.

    Only of images whose objects differ in hue; measured on the pixels.
    """
    hues = {list(scenes.COLOURS).index(colour) for colour in TRUE_HUES}
    chosen = []
    for i, caption in enumerate(many.captions):
        colours = many.colour[i, : int(many.count[i])].tolist()
        if re.search(words, caption) and len(colours) == len(set(colours)) and set(colours) <= hues:
            chosen.append(i)
    chosen = chosen[:limit]

    measured = []
    for i, image in zip(chosen, scenes.draw(chosen, seed=7).images, strict=True):
        colours = [list(scenes.COLOURS)[c] for c in many.colour[i, : int(many.count[i])]]
        masks = [has_tone(colour, image).nonzero().double() for colour in colours]
        assert min(len(mask) for mask in masks) >= 8, many.captions[i]
        measured.append((colours, np.array([mask.mean(0).flip(0).tolist() for mask in masks])))
    assert len(measured) >= min(limit, 6), words
    return measured


PHRASE = r"an? [a-z ]+?"
TWO = {" left of ": (0, -1), " right of ": (0, 1), " above ": (1, -1), " below ": (1, 1)}


@pytest.mark.parametrize("relation", TWO)
def test_two_objects_are_positioned_as_in_the_caption(many: scenes.Scenes, relation: str) -> None:
    axis, sign = TWO[relation]
    for _, centre in measure_centres(many, rf"^(?!.* and ).*{relation}", limit=10):
        assert sign * (centre[0, axis] - centre[1, axis]) > 6  # pixels of 64


def test_three_objects_are_positioned_as_in_the_caption(many: scenes.Scenes) -> None:
    for _, centre in measure_centres(many, " and .* above ", limit=8):
        assert max(centre[0, 1], centre[1, 1]) < centre[2, 1] - 6
    for _, centre in measure_centres(many, " above .* and ", limit=8):
        assert centre[0, 1] < min(centre[1, 1], centre[2, 1]) - 6
    for _, centre in measure_centres(many, " between ", limit=8):
        x = centre[:, 0]
        assert min(x[1], x[2]) + 3 < x[0] < max(x[1], x[2]) - 3


def test_what_a_relation_leaves_open_is_random(many: scenes.Scenes) -> None:
    between = [
        centre[1, 0] < centre[2, 0] for _, centre in measure_centres(many, " between ", limit=10)
    ]
    assert 0 < sum(between) < len(between)
    centres = np.array([centre[0] for _, centre in measure_centres(many, " left of ", limit=10)])
    assert centres.std(0).min() > 1.5


def lens(r: float, s: float, d: float) -> float:
    """The area that two discs of radius r and s at distance d share."""
    alpha, beta = (
        math.acos((d * d + r * r - s * s) / (2 * d * r)),
        math.acos((d * d + s * s - r * r) / (2 * d * s)),
    )
    kite = math.sqrt((-d + r + s) * (d + r - s) * (d - r + s) * (d + r + s)) / 2
    return r * r * alpha + s * s * beta - kite


UNIT_AREA = {
    "disc": math.pi * 0.9**2,
    "square": 1.56**2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.1**2,
    "star": 5 * 1.12 * 0.46 * math.sin(math.pi / 5),
    "ring": math.pi * (0.93**2 - 0.43**2),
    "cross": 2 * 1.9 * 0.64 - 0.64**2,
    "heart": (1 + math.pi / 4) / 0.86**2,
    "moon": math.pi * 0.98**2 - lens(0.98, 0.78, math.hypot(0.52, 0.1)),
}


@pytest.mark.parametrize("name", scenes.SHAPES)
def test_a_shape_has_the_area_of_its_closed_form(name: str) -> None:
    axis = (torch.arange(600) + 0.5) / 600 * 3 - 1.5
    q, p = torch.meshgrid(axis, axis, indexing="ij")
    inside = scenes._UNIT_SHAPES[name](p, q) < 0
    assert float(inside.double().mean()) * 9 == pytest.approx(UNIT_AREA[name], rel=0.02)


def test_painted_objects_have_the_area_of_their_shape(many: scenes.Scenes) -> None:
    """Single plain objects: pixels of the object's colour against closed form × radius²."""
    alone = [i for i in range(len(MANY)) if many.count[i] == 1 and many.pattern[i, 0] == 0]
    alone = [i for i in alone if list(scenes.COLOURS)[many.colour[i, 0]] in TRUE_HUES][:80]

    ratios = defaultdict(list)
    for i, image in zip(alone, scenes.draw(alone, seed=7).images, strict=True):
        shape = scenes.SHAPES[many.shape[i, 0]]
        expected = UNIT_AREA[shape] * float(scenes._RADII[1, many.size[i, 0]]) ** 2 * 32**2
        ratios[shape].append(
            float(has_tone(list(scenes.COLOURS)[many.colour[i, 0]], image).sum()) / expected
        )
    assert set(ratios) == set(scenes.SHAPES)
    for shape, found in ratios.items():
        assert 0.8 < np.median(found) < 1.1 and min(found) > 0.5, (shape, found)


def test_edges_are_antialiased(many: scenes.Scenes) -> None:
    """A thin line of pixels between object and ground has a mixture of their colours."""
    chosen = [
        i
        for i in range(len(MANY))
        if many.count[i] == 1
        and many.pattern[i, 0] == 0
        and list(scenes.COLOURS)[many.colour[i, 0]] in TRUE_HUES
        and list(scenes.GROUNDS)[many.ground[i]] in ("grey", "night")  # these never clip either
    ][:12]
    for i, image in zip(chosen, scenes.draw(chosen, seed=7).images, strict=True):
        is_object = has_tone(list(scenes.COLOURS)[many.colour[i, 0]], image)
        rgb = torch.tensor(list(scenes.GROUNDS.values())[many.ground[i]])[:, None, None]
        is_ground = torch.cosine_similarity((image + 1) / 2, rgb, dim=0) > 0.9995
        neither = (~is_object & ~is_ground).float()
        assert 0.01 < neither.mean() < 0.2

        # They are at the object's edge; at the tip of a point they may be further away
        near_object = torch.nn.functional.max_pool2d(is_object.float()[None, None], 5, 1, 2)[0, 0]
        assert (neither * (1 - near_object)).sum() < 0.1 * neither.sum()


def test_patterned_objects_have_two_tones() -> None:
    """Striped, dotted and checkered objects have two tones; plain ones have one."""
    batch = scenes.draw(range(300), seed=9, image_size=48)
    shares = defaultdict(list)
    for i in range(300):
        colour = list(scenes.COLOURS)[batch.colour[i, 0]]
        if batch.count[i] == 1 and colour in TRUE_HUES:
            image = batch.images[i]
            rgb = torch.tensor(scenes.COLOURS[colour])[:, None, None]
            pale = torch.cosine_similarity((image + 1) / 2, 0.3 * rgb + 0.7, dim=0) > 0.9995
            shares[scenes.PATTERNS[batch.pattern[i, 0]]].append(
                float(pale.sum()) / float(has_tone(colour, image).sum())
            )

    assert np.median(shares["plain"]) < 0.05
    for pattern in ("striped", "dotted", "checkered"):
        assert 0.1 < np.median(shares[pattern]) < 3, pattern
