"""The learning-rate schedule shared by both training loops."""

from __future__ import annotations

import math


def cosine_decay(progress: float, peak: float, warmup: float = 0.0, floor: float = 0.0) -> float:
    """The learning rate after the warm-up: a cosine from `peak` down to `floor` · `peak`.

    `progress` is the share of the training done, from `warmup` (the end of the warm-up) to 1.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (floor + (1 - floor) * cosine)
