"""The pocket world: procedurally drawn, captioned pictures of one to three objects.

A picture is a pure function of `(seed, index)`; batches are vectorised but never change it.
The caption states some attributes in plain English; everything it leaves open (pose, exact
place, pattern phase, light, the ground's weave, and any attribute it does not mention) is
random, so that a caption never fixes the picture.

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
# How the objects lie, by how many there are. "{0}" is the first object's phrase, and so on.
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

_NUM_DRAWS = 96
_RADII = torch.tensor(
    [[0.0, 0.0], [0.50, 0.70], [0.37, 0.46], [0.33, 0.40]]
)  # [count, size], half-widths
# Centres of the objects for each layout, in [-1, 1], y down.
_PAIR = torch.tensor([[-0.48, 0.0], [0.48, 0.0], [0.0, 0.0]])
_STACK = torch.tensor([[0.0, -0.48], [0.0, 0.48], [0.0, 0.0]])
_TWO_ABOVE = torch.tensor([[-0.48, -0.46], [0.48, -0.46], [0.0, 0.46]])
_TWO_BELOW = torch.tensor([[0.0, -0.46], [-0.48, 0.46], [0.48, 0.46]])
_ROW = torch.tensor([[0.0, 0.0], [-0.65, 0.0], [0.65, 0.0]])


@dataclass(frozen=True)
class Scenes:
    """A batch of B pictures with everything that was decided about them.

    `images` [B, 3, H, W] in [-1, 1]; `captions` B strings; labels are int64: `count` [B] in 1…3,
    `shape`, `colour`, `pattern`, `size` [B, 3] (-1 where there is no such object), `ground` [B].
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
class Stated:
    """What a caption states; None where it is silent. One tuple entry per object."""

    shape: tuple[str, ...]
    colour: tuple[str | None, ...]
    pattern: tuple[str | None, ...]
    ground: str | None

    @property
    def count(self) -> int:
        return len(self.shape)


class _Draws:
    """Uniform numbers of each picture, handed out column by column."""

    def __init__(self, indices: Sequence[int], seed: int) -> None:
        rows = [
            np.random.Generator(np.random.Philox(key=[seed, index])).random(_NUM_DRAWS)
            for index in indices
        ]
        self._table = torch.from_numpy(np.array(rows, dtype=np.float64)).float()
        self._next = 0

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[B, *shape] float32 in [low, high)."""
        size = math.prod(shape)
        if self._next + size > _NUM_DRAWS:
            raise AssertionError("raise _NUM_DRAWS: a picture uses more random numbers than it has")
        columns = self._table[:, self._next : self._next + size]
        self._next += size
        return (low + (high - low) * columns).reshape(-1, *shape)

    def integer(self, *shape: int, num: int) -> Tensor:
        """[B, *shape] int64 in 0 … num-1."""
        return (self.uniform(*shape) * num).long().clamp_max(num - 1)


@dataclass(frozen=True)
class _Decided:
    count: Tensor
    relation: Tensor
    shape: Tensor
    colour: Tensor
    pattern: Tensor
    size: Tensor
    ground: Tensor
    captions: list[str]


def draw(indices: Sequence[int], seed: int, image_size: int = IMAGE_SIZE) -> Scenes:
    """Draws pictures `indices` of world `seed`. `image_size` in pixels, any; 64 is what the models are for."""
    draws = _Draws(indices, seed)
    d = _decide(draws)
    centre = _centres(draws, d.count, d.relation)
    in_row = (d.count == 3) & (d.relation == 2)
    shrink = torch.where(in_row, 0.8, 1.0)[:, None]
    radius = _RADII[d.count[:, None], d.size] * draws.uniform(3, low=0.94, high=1.06) * shrink
    exists = torch.arange(3) < d.count[:, None]
    images = _paint(
        draws, centre, radius, exists, d.shape, d.colour, d.pattern, d.ground, image_size
    )
    shape, colour, pattern, size = (
        label.masked_fill(~exists, -1) for label in (d.shape, d.colour, d.pattern, d.size)
    )
    return Scenes(images, d.captions, d.count, shape, colour, pattern, size, d.ground)


def captions(indices: Sequence[int], seed: int) -> list[str]:
    """The captions of `draw(indices, seed)`, without painting."""
    return _decide(_Draws(indices, seed)).captions


def pairs_captions(seed: int) -> Callable[[Sequence[int]], list[str]]:
    """The captions of a set of pairs with this seed, as a function of the pairs' indices."""
    world = assets.pairs_world(seed)
    return lambda indices: captions(indices, world)


def _decide(draws: _Draws) -> _Decided:
    """Everything with a name: how many objects, what they are, how they lie, and what the caption says of it."""
    count = torch.tensor([1, 1, 2, 2, 3])[draws.integer(num=5)]
    shape, colour = draws.integer(3, num=len(SHAPES)), draws.integer(3, num=len(COLOURS))
    pattern, size = draws.integer(3, num=len(PATTERNS)), draws.integer(3, num=len(SIZES))
    ground = draws.integer(num=len(GROUNDS))
    num_relations = torch.tensor([1] + [len(RELATIONS[n]) for n in (1, 2, 3)])
    relation = (draws.uniform() * num_relations[count]).long()
    mentions = draws.uniform(3, 3) < torch.tensor([0.5, 0.75, 0.92])  # size, pattern, colour
    mentions_ground = draws.uniform() < 0.9
    said = [
        _caption(
            int(count[i]),
            int(relation[i]),
            shape[i],
            colour[i],
            pattern[i],
            size[i],
            mentions[i],
            list(GROUNDS)[int(ground[i])] if mentions_ground[i] else None,
        )
        for i in range(len(count))
    ]
    return _Decided(count, relation, shape, colour, pattern, size, ground, said)


def _caption(
    count: int,
    relation: int,
    shape: Tensor,
    colour: Tensor,
    pattern: Tensor,
    size: Tensor,
    mentions: Tensor,
    ground: str | None,
) -> str:
    phrases = []
    for k in range(count):
        words = [SHAPES[int(shape[k])]]
        if mentions[k, 2]:
            words.insert(0, list(COLOURS)[int(colour[k])])
        if mentions[k, 1]:
            words.insert(0, PATTERNS[int(pattern[k])])
        if mentions[k, 0]:
            words.insert(0, SIZES[int(size[k])])
        phrases.append(f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}")
    text = RELATIONS[count][relation].format(*phrases)
    return f"{text} on {ground}" if ground else text


def stated(caption: str) -> Stated:
    """Reads a caption of this world back. Raises ValueError at a word the grammar does not have."""
    words = re.findall(r"[a-z]+|,", caption.lower())
    unknown = [word for word in words if word not in WORDS]
    if unknown or not any(word in SHAPES for word in words):
        raise ValueError(
            f"not a caption of the pocket world: {caption!r} (unknown: {', '.join(unknown) or 'no shape'})"
        )
    shapes: list[str] = []
    colours: list[str | None] = []
    patterns: list[str | None] = []
    colour = pattern = None
    for word in words:
        colour = word if word in COLOURS else colour
        pattern = word if word in PATTERNS else pattern
        if word in SHAPES:
            shapes.append(word)
            colours.append(colour)
            patterns.append(pattern)
            colour = pattern = None
    ground = words[-1] if words[-1] in GROUNDS else None
    return Stated(tuple(shapes), tuple(colours), tuple(patterns), ground)


def _centres(draws: _Draws, count: Tensor, relation: Tensor) -> Tensor:
    """[B, 3, 2] centres in [-1, 1]: the relation's layout, jittered; what it leaves open is drawn."""
    swap, free = draws.uniform() < 0.5, draws.integer(num=2)
    layouts = torch.zeros(len(count), 3, 2)
    mirrored = torch.tensor([-1.0, 1.0])
    for i, (n, r) in enumerate(zip(count.tolist(), relation.tolist(), strict=True)):
        if n == 2:  # left of, right of, above, below, and
            upright = r in (2, 3) or (r == 4 and bool(free[i]))
            layout = _STACK if upright else _PAIR
            flipped = r in (1, 3) or (r == 4 and bool(swap[i]))
            layouts[i] = -layout if flipped else layout
        elif n == 3:  # two above one, one above two, between, in any order
            layout = (_TWO_ABOVE, _TWO_BELOW, _ROW, (_TWO_ABOVE, _TWO_BELOW)[int(free[i])])[r]
            layouts[i] = layout * mirrored if swap[i] else layout
    reach = torch.tensor([[0.0, 0.0], [0.26, 0.26], [0.08, 0.08], [0.06, 0.06]])[count][
        :, None
    ]  # [B, 1, 2]
    jitter = draws.uniform(3, 2, low=-1.0, high=1.0) * reach
    in_pair = (count == 2)[:, None, None].float()
    across = (layouts.abs() < 1e-3).float() * in_pair * draws.uniform(3, 1, low=-0.22, high=0.22)
    return layouts + jitter + across


def _paint(
    draws: _Draws,
    centre: Tensor,
    radius: Tensor,
    exists: Tensor,
    shape: Tensor,
    colour: Tensor,
    pattern: Tensor,
    ground: Tensor,
    image_size: int,
) -> Tensor:
    axis = (torch.arange(image_size) + 0.5) / image_size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixel = 2.0 / image_size
    light = draws.uniform(low=0.0, high=2 * math.pi)
    towards = torch.stack([light.cos(), light.sin()], -1)[:, :, None, None]  # [B, 2, 1, 1]

    image = _ground(draws, ground, x, y, towards)
    palette = torch.tensor(list(COLOURS.values()))
    turn = draws.uniform(3, low=-0.7, high=0.7)
    angle, period = draws.uniform(3, low=0.0, high=math.pi), draws.uniform(3, low=0.19, high=0.28)
    phase = draws.uniform(3, 2)
    for k in range(3):
        u, v = x - centre[:, k, 0, None, None], y - centre[:, k, 1, None, None]  # [B, H, W]
        shadow = _distance(
            u + 0.09 * towards[:, 0],
            v + 0.09 * towards[:, 1],
            radius[:, k],
            turn[:, k],
            shape[:, k],
        )
        visible = exists[:, k, None, None].float()
        image = image * (1 - 0.42 * visible * (0.5 - shadow / (5 * pixel)).clamp(0, 1))[:, None]

        distance = _distance(u, v, radius[:, k], turn[:, k], shape[:, k])
        rgb = _surface(
            u,
            v,
            palette[colour[:, k]],
            colour[:, k],
            pattern[:, k],
            angle[:, k],
            period[:, k],
            phase[:, k],
            pixel,
        )
        slope = (u * towards[:, 0] + v * towards[:, 1]) / radius[:, k, None, None]
        rim = (-distance / (2.5 * pixel)).clamp(0, 1)
        rgb = rgb * (0.9 + 0.16 * slope)[:, None] * (0.62 + 0.38 * rim)[:, None]
        alpha = (visible * (0.5 - distance / pixel).clamp(0, 1))[:, None]
        image = image * (1 - alpha) + rgb * alpha
    return (image.clamp(0, 1) * 2 - 1).contiguous()


def _ground(draws: _Draws, ground: Tensor, x: Tensor, y: Tensor, towards: Tensor) -> Tensor:
    """[B, 3, H, W]: the ground's colour, woven of three random waves and lit from one side."""
    base = torch.tensor(list(GROUNDS.values()))[ground][:, :, None, None]
    direction, frequency = draws.uniform(3, high=2 * math.pi), draws.uniform(3, low=4.0, high=16.0)
    phase = draws.uniform(3, high=2 * math.pi)
    weave = torch.zeros(len(ground), *x.shape)
    for k in range(3):
        along = x * direction[:, k].cos()[:, None, None] + y * direction[:, k].sin()[:, None, None]
        weave += torch.sin(frequency[:, k, None, None] * along + phase[:, k, None, None])
    lit = 0.07 * (x * towards[:, 0] + y * towards[:, 1])
    return base * (1 + lit + 0.05 * weave)[:, None]


def _surface(
    u: Tensor,
    v: Tensor,
    rgb: Tensor,
    colour: Tensor,
    pattern: Tensor,
    angle: Tensor,
    period: Tensor,
    phase: Tensor,
    pixel: float,
) -> Tensor:
    """[B, 3, H, W]: the object's colour, or two tones of it in its pattern, antialiased."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    cycles = 2 * math.pi / period[:, None, None]
    a = cycles * (u * cos + v * sin) + 2 * math.pi * phase[:, 0, None, None]
    b = cycles * (v * cos - u * sin) + 2 * math.pi * phase[:, 1, None, None]
    wave = torch.stack(
        [
            torch.full_like(a, -9.0),
            a.sin(),
            (a.cos() + b.cos()) - 0.55,
            a.sin() * b.sin() * 1.6,
        ],
        1,
    )  # [B, pattern, H, W]
    chosen = wave.gather(1, pattern[:, None, None, None].expand(-1, 1, *u.shape[1:]))
    second = (0.5 + chosen * period[:, None, None, None] / (2 * math.pi) / pixel).clamp(0, 1)
    white = (colour == list(COLOURS).index("white"))[:, None]
    other = torch.where(white, torch.tensor([0.36, 0.38, 0.46]), 0.3 * rgb + 0.7)
    return rgb[:, :, None, None] * (1 - second) + other[:, :, None, None] * second


def _distance(u: Tensor, v: Tensor, radius: Tensor, turn: Tensor, shape: Tensor) -> Tensor:
    """[B, H, W] signed distance to each picture's shape, negative inside, in the units of u and v."""
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    r = radius[:, None, None]
    p, q = (u * cos + v * sin) / r, (v * cos - u * sin) / r
    out = torch.empty_like(p)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows):
            out[rows] = _UNIT_SHAPES[name](p[rows], q[rows])
    return out * r


def _spikes(p: Tensor, q: Tensor, num: int, inner: float, outer: float = 1.0) -> Tensor:
    """A star of `num` points; with inner = outer·cos(π/num) a regular polygon. Distance to its edges' lines."""
    half = math.pi / num
    folded = (
        torch.remainder(torch.atan2(q, p) + math.pi / 2 + half, 2 * half) - half
    ).abs()  # first point up
    rho = (p * p + q * q).sqrt()
    x, y = rho * folded.cos(), rho * folded.sin()
    dx, dy = inner * math.cos(half) - outer, inner * math.sin(half)
    return ((x - outer) * dy - y * dx) / math.hypot(dx, dy)


def _box(p: Tensor, q: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(p.abs() - width, q.abs() - height)


def _heart(p: Tensor, q: Tensor) -> Tensor:
    x, y = p.abs() * 0.86, q * 0.86 + 0.06  # a diamond and two discs on its upper edges
    disc = ((x - 0.354) ** 2 + (y + 0.354) ** 2).sqrt() - 0.5
    diamond = (x + y.abs() - 0.707) * 0.7071
    return torch.minimum(disc, diamond) / 0.86


def _norm(p: Tensor, q: Tensor) -> Tensor:
    return (p * p + q * q).sqrt()


_UNIT_SHAPES = {
    "disc": lambda p, q: _norm(p, q) - 0.9,
    "square": lambda p, q: _box(p, q, 0.78, 0.78),
    "triangle": lambda p, q: _spikes(p, q + 0.0, 3, 1.1 * math.cos(math.pi / 3), 1.1),
    "star": lambda p, q: _spikes(p, q, 5, 0.46, 1.12),
    "ring": lambda p, q: (_norm(p, q) - 0.68).abs() - 0.25,
    "cross": lambda p, q: torch.minimum(_box(p, q, 0.95, 0.32), _box(p, q, 0.32, 0.95)),
    "heart": _heart,
    "moon": lambda p, q: torch.maximum(_norm(p, q) - 0.98, 0.78 - _norm(p - 0.52, q + 0.1)),
}
