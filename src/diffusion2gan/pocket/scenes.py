"""The pocket world: procedurally drawn, captioned images of one to three objects.

An image is a pure function of `(seed, index)`; batches are vectorised but never change it. The
caption names some attributes in plain English. Everything else is random, so that a caption never
determines the image: pose, exact position, pattern phase, light, the texture of the ground, and
every attribute that it does not mention.

A *world* is all images with one `seed`: training, pairs and evaluation use different worlds.

    >>> batch = draw(range(4), seed=0)
    >>> batch.images.shape, batch.captions[0]
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion2gan import assets

SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = {
    "red": (0.85, 0.16, 0.18),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.86, 0.20),
    "green": (0.20, 0.62, 0.28),
    "cyan": (0.15, 0.74, 0.78),
    "blue": (0.18, 0.34, 0.86),
    "purple": (0.52, 0.22, 0.72),
    "white": (0.97, 0.97, 0.95),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
GROUNDS = {
    "pink": (0.95, 0.74, 0.80),
    "sky": (0.66, 0.83, 0.96),
    "sand": (0.91, 0.82, 0.64),
    "mint": (0.70, 0.90, 0.78),
    "grey": (0.62, 0.63, 0.66),
    "lilac": (0.79, 0.73, 0.94),
    "night": (0.17, 0.19, 0.33),
}
# The caption's form, by the number of objects. "{0}" is replaced by the first object's phrase, …
RELATIONS = {
    1: ("{0}",),
    2: ("{0} left of {1}", "{0} right of {1}", "{0} above {1}", "{0} below {1}", "{0} and {1}"),
    3: (
        "{0} and {1} above {2}",
        "{0} above {1} and {2}",
        "{0} between {1} and {2}",
        "{0}, {1} and {2}",
    ),
}
WORDS = sorted(
    {
        *SHAPES,
        *COLOURS,
        *PATTERNS,
        *SIZES,
        *GROUNDS,
        *"a an on left right of above below between and ,".split(),
    }
)
IMAGE_SIZE = 64

# Uniform random numbers available per image. Raising it leaves the first ones, and so all images,
# unchanged.
_NUM_DRAWS = 96
# [count, size] half-widths of objects, in the coordinates [-1, 1] of the image
_RADII = torch.tensor([[0.0, 0.0], [0.50, 0.70], [0.37, 0.46], [0.33, 0.40]])
# Centres of the objects (x, y) for each layout, in [-1, 1], y down.
_PAIR = torch.tensor([[-0.48, 0.0], [0.48, 0.0], [0.0, 0.0]])
_STACK = torch.tensor([[0.0, -0.48], [0.0, 0.48], [0.0, 0.0]])
_TWO_ABOVE = torch.tensor([[-0.48, -0.46], [0.48, -0.46], [0.0, 0.46]])
_TWO_BELOW = torch.tensor([[0.0, -0.46], [-0.48, 0.46], [0.48, 0.46]])
_ROW = torch.tensor([[0.0, 0.0], [-0.65, 0.0], [0.65, 0.0]])
# [count] how far a centre may be from its layout's, per axis
_JITTER = torch.tensor([0.0, 0.26, 0.08, 0.06])


@dataclass(frozen=True)
class Scenes:
    """A batch of B images with all attributes of their objects.

    `images` [B, 3, H, W] in [-1, 1]; `captions` B strings; labels are int64: `count` [B] in 1 … 3,
    `shape`, `colour`, `pattern`, `size` [B, 3] (-1 for an object that does not exist), `ground`
    [B].
    """

    images: Tensor
    captions: list[str]
    count: Tensor
    shape: Tensor
    colour: Tensor
    pattern: Tensor
    size: Tensor
    ground: Tensor


@dataclass(frozen=True)
class CaptionContent:
    """The attributes that a caption names, None if it does not. One tuple entry per object."""

    shape: tuple[str, ...]
    colour: tuple[str | None, ...]
    pattern: tuple[str | None, ...]
    ground: str | None

    @property
    def count(self) -> int:
        return len(self.shape)


class _UniformDraws:
    """The uniform random numbers of each image, used column by column.

    The order in which they are used defines the world: do not change it.
    """

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        rows = []
        for index in indices:
            generator = np.random.Generator(np.random.Philox(key=[seed, index]))
            rows.append(generator.random(_NUM_DRAWS))
        self._table = torch.from_numpy(np.array(rows, dtype=np.float64)).float()  # [B, _NUM_DRAWS]
        self._next = 0

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B, *shape] float32 in [low, high)."""
        size = math.prod(shape)
        if self._next + size > _NUM_DRAWS:
            raise AssertionError("an image uses more random numbers than _NUM_DRAWS: raise it")
        columns = self._table[:, self._next : self._next + size]
        self._next += size
        return (low + (high - low) * columns).reshape(-1, *shape)

    def integer(self, *shape: int, num: int) -> Tensor:
        """[B, *shape] int64 in 0 … num-1."""
        return (self.uniform(*shape) * num).long().clamp_max(num - 1)


@dataclass(frozen=True)
class _Attributes:
    """The attributes that captions name: labels as in `Scenes`, but for three objects per image.

    `relation` [B] is the index of the caption's form in RELATIONS[count].
    """

    count: Tensor
    relation: Tensor
    shape: Tensor
    colour: Tensor
    pattern: Tensor
    size: Tensor
    ground: Tensor
    captions: list[str]


def draw(indices: Sequence[int], seed: int, image_size: int = IMAGE_SIZE) -> Scenes:
    """Draws the images `indices` of world `seed`.

    `image_size` in pixels is arbitrary; the pocket models use 64.
    """
    draws = _UniformDraws(indices, seed)

    # 1. Attributes and captions
    attributes = _draw_attributes(draws)
    count, relation = attributes.count, attributes.relation

    # 2. Positions and sizes
    centre = _draw_centres(draws, count, relation)
    in_row = (count == 3) & (relation == 2)
    row_scale = torch.where(in_row, 0.8, 1.0)[:, None]
    scale = draws.uniform(3, low=0.94, high=1.06)
    radius = _RADII[count[:, None], attributes.size] * scale * row_scale
    exists = torch.arange(3) < count[:, None]

    # 3. The image
    images = _paint(draws, attributes, centre, radius, exists, image_size)

    # 4. Labels: -1 for objects that do not exist
    return Scenes(
        images,
        attributes.captions,
        count,
        shape=attributes.shape.masked_fill(~exists, -1),
        colour=attributes.colour.masked_fill(~exists, -1),
        pattern=attributes.pattern.masked_fill(~exists, -1),
        size=attributes.size.masked_fill(~exists, -1),
        ground=attributes.ground,
    )


def captions(indices: Sequence[int], seed: int) -> list[str]:
    """The captions of `draw(indices, seed)`, without painting."""
    return _draw_attributes(_UniformDraws(indices, seed)).captions


def pairs_captions(seed: int) -> Callable[[Sequence[int]], list[str]]:
    """The captions of a set of pairs with this seed, as a function of the pairs' indices."""
    world = assets.pairs_world(seed)
    return lambda indices: captions(indices, world)


def _draw_attributes(draws: _UniformDraws) -> _Attributes:
    """Draws the number of objects, their attributes, their relation and the caption."""
    count = torch.tensor([1, 1, 2, 2, 3])[draws.integer(num=5)]
    shape = draws.integer(3, num=len(SHAPES))
    colour = draws.integer(3, num=len(COLOURS))
    pattern = draws.integer(3, num=len(PATTERNS))
    size = draws.integer(3, num=len(SIZES))
    ground = draws.integer(num=len(GROUNDS))

    # The relation, one of RELATIONS[count]
    num_relations = torch.tensor([1] + [len(RELATIONS[n]) for n in (1, 2, 3)])
    relation = (draws.uniform() * num_relations[count]).long()

    # Which attributes the caption mentions: size, pattern, colour of each object, and the ground
    mentions = draws.uniform(3, 3) < torch.tensor([0.5, 0.75, 0.92])
    mentions_ground = draws.uniform() < 0.9

    # The captions
    colour_names = list(COLOURS)
    ground_names = list(GROUNDS)
    texts = []
    for i in range(len(count)):
        # A phrase per object, such as "a small striped red ring"
        num_objects = int(count[i])
        phrases = []
        for k in range(num_objects):
            words = []
            if mentions[i, k, 0]:
                words.append(SIZES[int(size[i, k])])
            if mentions[i, k, 1]:
                words.append(PATTERNS[int(pattern[i, k])])
            if mentions[i, k, 2]:
                words.append(colour_names[int(colour[i, k])])
            words.append(SHAPES[int(shape[i, k])])
            article = "an" if words[0][0] in "aeiou" else "a"
            phrases.append(f"{article} {' '.join(words)}")

        # Join them by the relation
        form = RELATIONS[num_objects][int(relation[i])]
        text = form.format(*phrases)
        if mentions_ground[i]:
            text += f" on {ground_names[int(ground[i])]}"
        texts.append(text)
    return _Attributes(count, relation, shape, colour, pattern, size, ground, texts)


def parse_caption(caption: str) -> CaptionContent:
    """Reads the attributes from a caption of this world.

    Raises ValueError for a word that is not in the grammar.
    """
    words = re.findall(r"[a-z]+|,", caption.lower())
    unknown = [word for word in words if word not in WORDS]
    if unknown or not any(word in SHAPES for word in words):
        raise ValueError(
            f"not a caption of the pocket world: {caption!r} "
            f"(unknown: {', '.join(unknown) or 'no shape'})"
        )

    # Adjectives precede the shape that they belong to
    shapes: list[str] = []
    colours: list[str | None] = []
    patterns: list[str | None] = []
    colour = pattern = None
    for word in words:
        if word in COLOURS:
            colour = word
        elif word in PATTERNS:
            pattern = word
        elif word in SHAPES:
            shapes.append(word)
            colours.append(colour)
            patterns.append(pattern)
            colour = pattern = None

    ground = words[-1] if words[-1] in GROUNDS else None
    return CaptionContent(tuple(shapes), tuple(colours), tuple(patterns), ground)


def _draw_centres(draws: _UniformDraws, count: Tensor, relation: Tensor) -> Tensor:
    """[B, 3, 2] centres (x, y) in [-1, 1]: the relation's layout with jitter.

    Choices that the relation does not determine are drawn at random.
    """
    swap = draws.uniform() < 0.5
    alternative = draws.integer(num=2)

    # 1. The layout of each image
    layouts = torch.zeros(len(count), 3, 2)
    mirror = torch.tensor([-1.0, 1.0])
    for i, (n, r) in enumerate(zip(count.tolist(), relation.tolist(), strict=True)):
        if n == 2:
            # Relations: left of, right of, above, below, and (any direction)
            any_direction = r == 4
            vertical = r in (2, 3) or (any_direction and bool(alternative[i]))
            layout = _STACK if vertical else _PAIR
            reversed_order = r in (1, 3) or (any_direction and bool(swap[i]))
            layouts[i] = -layout if reversed_order else layout
        elif n == 3:
            # Relations: two above one, one above two, between, any
            any_layout = (_TWO_ABOVE, _TWO_BELOW)[int(alternative[i])]
            layout = (_TWO_ABOVE, _TWO_BELOW, _ROW, any_layout)[r]
            layouts[i] = layout * mirror if swap[i] else layout

    # 2. Jitter of each object
    amplitude = _JITTER[count][:, None, None]
    jitter = draws.uniform(3, 2, low=-1.0, high=1.0) * amplitude

    # 3. A pair is also shifted along the axis that its relation does not determine
    is_pair = (count == 2)[:, None, None].float()
    is_open_axis = (layouts.abs() < 1e-3).float()
    open_shift = is_open_axis * is_pair * draws.uniform(3, 1, low=-0.22, high=0.22)
    return layouts + jitter + open_shift


def _paint(
    draws: _UniformDraws,
    attributes: _Attributes,
    centre: Tensor,
    radius: Tensor,
    exists: Tensor,
    image_size: int,
) -> Tensor:
    """[B, 3, H, W] in [-1, 1]: the ground, then each object's shadow and the object.

    `centre` [B, 3, 2]; `radius` and `exists` [B, 3].
    """
    # Pixel centres, x and y [H, W] in [-1, 1]
    axis = (torch.arange(image_size) + 0.5) / image_size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixel = 2.0 / image_size

    # The direction to the light, [B, 2, 1, 1]
    light_angle = draws.uniform(low=0.0, high=2 * math.pi)
    light = torch.stack([light_angle.cos(), light_angle.sin()], -1)[:, :, None, None]

    image = _paint_ground(draws, attributes.ground, x, y, light)

    # Pose and pattern of each object
    palette = torch.tensor(list(COLOURS.values()))
    rotation = draws.uniform(3, low=-0.7, high=0.7)
    pattern_angle = draws.uniform(3, low=0.0, high=math.pi)
    period = draws.uniform(3, low=0.19, high=0.28)
    phase = draws.uniform(3, 2)

    for k in range(3):
        # Coordinates relative to the object's centre, [B, H, W]
        u = x - centre[:, k, 0, None, None]
        v = y - centre[:, k, 1, None, None]
        outline = _Outline(attributes.shape[:, k], radius[:, k], rotation[:, k])
        visible = exists[:, k, None, None].float()

        # Shadow: the same outline, away from the light and blurred over five pixels
        shadow_u = u + 0.09 * light[:, 0]
        shadow_v = v + 0.09 * light[:, 1]
        shadow_distance = outline.distance(shadow_u, shadow_v)
        shade = visible * (0.5 - shadow_distance / (5 * pixel)).clamp(0, 1)
        transmitted = 1 - 0.42 * shade
        image = image * transmitted[:, None]

        # Surface: the pattern, brighter towards the light, with a dark rim
        surface = _Surface(
            palette[attributes.colour[:, k]],
            attributes.colour[:, k],
            attributes.pattern[:, k],
            pattern_angle[:, k],
            period[:, k],
            phase[:, k],
        )
        distance = outline.distance(u, v)
        rgb = surface.paint(u, v, pixel)
        towards_light = u * light[:, 0] + v * light[:, 1]
        slope = towards_light / radius[:, k, None, None]
        brightness = 0.9 + 0.16 * slope
        rim = (-distance / (2.5 * pixel)).clamp(0, 1)
        rim_brightness = 0.62 + 0.38 * rim
        rgb = rgb * brightness[:, None] * rim_brightness[:, None]

        # Blend it over the image, antialiased over one pixel
        coverage = (0.5 - distance / pixel).clamp(0, 1)
        alpha = (visible * coverage)[:, None]
        image = image * (1 - alpha) + rgb * alpha

    return (image.clamp(0, 1) * 2 - 1).contiguous()


def _paint_ground(
    draws: _UniformDraws, ground: Tensor, x: Tensor, y: Tensor, light: Tensor
) -> Tensor:
    """[B, 3, H, W]: the ground's colour, textured by three random waves and lit from one side."""
    palette = torch.tensor(list(GROUNDS.values()))
    base = palette[ground][:, :, None, None]

    # Texture: the sum of three waves, [B, H, W]
    direction = draws.uniform(3, high=2 * math.pi)
    frequency = draws.uniform(3, low=4.0, high=16.0)
    phase = draws.uniform(3, high=2 * math.pi)
    texture = torch.zeros(len(ground), *x.shape)
    for k in range(3):
        cos = direction[:, k].cos()[:, None, None]
        sin = direction[:, k].sin()[:, None, None]
        along = x * cos + y * sin
        cycles = frequency[:, k, None, None] * along
        texture += torch.sin(cycles + phase[:, k, None, None])

    # Lighting
    towards_light = x * light[:, 0] + y * light[:, 1]
    lighting = 0.07 * towards_light
    brightness = 1 + lighting + 0.05 * texture
    return base * brightness[:, None]


@dataclass(frozen=True)
class _Surface:
    """The colours of one object per image.

    `rgb` [B, 3]; `colour`, `pattern` [B] labels; `angle` [B] of the pattern in radians; `period`
    [B] in the image's coordinates; `phase` [B, 2] in [0, 1).
    """

    rgb: Tensor
    colour: Tensor
    pattern: Tensor
    angle: Tensor
    period: Tensor
    phase: Tensor

    def paint(self, u: Tensor, v: Tensor, pixel: float) -> Tensor:
        """[B, 3, H, W]: the colour, or two tones of it in the pattern, antialiased.

        `u`, `v` [B, H, W]: coordinates relative to the object's centre; `pixel`: a pixel's side.
        """
        # Phases along the pattern's two axes
        cos = self.angle.cos()[:, None, None]
        sin = self.angle.sin()[:, None, None]
        cycles = 2 * math.pi / self.period[:, None, None]
        phase_a = 2 * math.pi * self.phase[:, 0, None, None]
        phase_b = 2 * math.pi * self.phase[:, 1, None, None]
        a = cycles * (u * cos + v * sin) + phase_a
        b = cycles * (v * cos - u * sin) + phase_b

        # For each pattern a function that is positive in the second tone, [B, pattern, H, W]
        plain = torch.full_like(a, -9.0)
        striped = a.sin()
        dotted = (a.cos() + b.cos()) - 0.55
        checkered = a.sin() * b.sin() * 1.6
        waves = torch.stack([plain, striped, dotted, checkered], 1)
        index = self.pattern[:, None, None, None].expand(-1, 1, *u.shape[1:])
        wave = waves.gather(1, index)  # [B, 1, H, W]

        # The share of the second tone in each pixel
        period = self.period[:, None, None, None]
        pixels = wave * period / (2 * math.pi) / pixel
        second = (0.5 + pixels).clamp(0, 1)

        # The second tone is paler; that of white is dark
        white = list(COLOURS).index("white")
        is_white = (self.colour == white)[:, None]
        pale = 0.3 * self.rgb + 0.7
        second_rgb = torch.where(is_white, torch.tensor([0.36, 0.38, 0.46]), pale)

        # Mix the two tones
        first_tone = self.rgb[:, :, None, None]
        second_tone = second_rgb[:, :, None, None]
        return first_tone * (1 - second) + second_tone * second


@dataclass(frozen=True)
class _Outline:
    """The outline of one object per image: `shape` [B] labels, `radius` [B], `rotation` [B]."""

    shape: Tensor
    radius: Tensor
    rotation: Tensor

    def distance(self, u: Tensor, v: Tensor) -> Tensor:
        """[B, H, W] signed distance to the outline, negative inside, in the units of `u`, `v`."""
        # Coordinates of the rotated shape of radius 1
        cos = self.rotation.cos()[:, None, None]
        sin = self.rotation.sin()[:, None, None]
        r = self.radius[:, None, None]
        p = (u * cos + v * sin) / r
        q = (v * cos - u * sin) / r

        # The images of each shape
        distance = torch.empty_like(p)
        for label, name in enumerate(SHAPES):
            rows = (self.shape == label).nonzero()[:, 0]
            if len(rows) > 0:
                distance[rows] = _UNIT_SHAPES[name](p[rows], q[rows])
        return distance * r


# Signed distances (approximate for some) to shapes of radius about 1, at (p, q), q down.


def _length(p: Tensor, q: Tensor) -> Tensor:
    return (p * p + q * q).sqrt()


def _box(p: Tensor, q: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(p.abs() - half_width, q.abs() - half_height)


def _spikes(p: Tensor, q: Tensor, num: int, inner: float, outer: float = 1.0) -> Tensor:
    """Distance to the lines of the edges of a star with `num` points, the first one upwards.

    `inner` and `outer` are the radii of its corners; with inner = outer·cos(π/num) it is a regular
    polygon.
    """
    # By symmetry, fold the plane into the half sector from a point to the next inner corner
    half = math.pi / num
    angle = torch.atan2(q, p) + math.pi / 2
    within_sector = torch.remainder(angle + half, 2 * half) - half
    folded = within_sector.abs()
    rho = _length(p, q)
    x = rho * folded.cos()
    y = rho * folded.sin()

    # Distance to the line through (outer, 0) and the inner corner
    dx = inner * math.cos(half) - outer
    dy = inner * math.sin(half)
    return ((x - outer) * dy - y * dx) / math.hypot(dx, dy)


def _disc(p: Tensor, q: Tensor) -> Tensor:
    return _length(p, q) - 0.9


def _square(p: Tensor, q: Tensor) -> Tensor:
    return _box(p, q, 0.78, 0.78)


def _triangle(p: Tensor, q: Tensor) -> Tensor:
    return _spikes(p, q + 0.0, 3, 1.1 * math.cos(math.pi / 3), 1.1)


def _star(p: Tensor, q: Tensor) -> Tensor:
    return _spikes(p, q, 5, 0.46, 1.12)


def _ring(p: Tensor, q: Tensor) -> Tensor:
    return (_length(p, q) - 0.68).abs() - 0.25


def _cross(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(_box(p, q, 0.95, 0.32), _box(p, q, 0.32, 0.95))


def _heart(p: Tensor, q: Tensor) -> Tensor:
    """A diamond and two discs on its upper edges."""
    x = p.abs() * 0.86
    y = q * 0.86 + 0.06
    disc = ((x - 0.354) ** 2 + (y + 0.354) ** 2).sqrt() - 0.5
    diamond = (x + y.abs() - 0.707) * 0.7071
    return torch.minimum(disc, diamond) / 0.86


def _moon(p: Tensor, q: Tensor) -> Tensor:
    """A disc without another disc."""
    return torch.maximum(_length(p, q) - 0.98, 0.78 - _length(p - 0.52, q + 0.1))


_UNIT_SHAPES = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "moon": _moon,
}
