"""The seeds and noise of pairs: each pair has its own CPU generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion2gan.errors import UserError

# torch's CPU generator uses 32 bits of a seed: 256 sets of 16.7 M pairs never share noise.
NUM_SET_SEEDS = 256
PAIRS_PER_SEED = 2**24


def pair_seed(set_seed: int, index: int) -> int:
    """The seed of pair `index` of a set.

    It works unchanged with `torch.Generator("cpu").manual_seed` and a stock diffusers pipeline.
    """
    if not 0 <= set_seed < NUM_SET_SEEDS:
        raise UserError(
            f"--seed {set_seed}: the seed of a set must be 0 to {NUM_SET_SEEDS - 1}, so that sets "
            "never share noise"
        )
    if not 0 <= index < PAIRS_PER_SEED:
        raise UserError(
            f"pair {index}: one seed has {PAIRS_PER_SEED} pairs; use another --seed for more"
        )
    return set_seed * PAIRS_PER_SEED + index


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """[B, *shape] float32, N(0, I). Each row depends on its seed alone, not on the batch."""
    rows = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)
