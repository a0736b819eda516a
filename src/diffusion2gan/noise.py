"""Seeds and noise of pairs: each pair has its own CPU generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion2gan.errors import UserError

PAIRS_PER_SEED = (
    2**24
)  # torch's CPU generator takes 32 bits of a seed: 256 sets of 16.7 M pairs never share a noise


def pair_seed(set_seed: int, index: int) -> int:
    """The seed of pair `index`: usable as it is with `torch.Generator("cpu").manual_seed` and a stock pipeline."""
    if not 0 <= set_seed < 256:
        raise UserError(
            f"--seed {set_seed}: a set's seed is 0 to 255, so that sets never share a noise"
        )
    if not 0 <= index < PAIRS_PER_SEED:
        raise UserError(
            f"pair {index}: one seed has {PAIRS_PER_SEED} pairs; use another --seed for more"
        )
    return set_seed * PAIRS_PER_SEED + index


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """[B, *shape] float32, N(0, I): each pair's from its own CPU generator, whatever the batch."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    )
