"""Both players' Adam: torch's own, or with its two averages in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe

BETAS, DISCRIMINATOR_BETAS = (0.9, 0.99), (0.0, 0.99)  # Adam's; no momentum where the target moves


def student_optimizer(recipe: Recipe, module: nn.Module) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019). Raises UserError where it is to be of 8 bits and bitsandbytes is not here."""
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": BETAS,
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adamw8bit":
        return eight_bit().AdamW8bit(module.parameters(), **options)  # type: ignore[no-any-return]
    return torch.optim.AdamW(module.parameters(), **options)


def discriminator_optimizer(recipe: Recipe, module: nn.Module) -> Optimizer:
    """Adam without momentum, of as many bits as the student's."""
    options: dict[str, Any] = {
        "lr": recipe.discriminator_learning_rate,
        "betas": DISCRIMINATOR_BETAS,
    }
    if recipe.optimizer == "adamw8bit":
        return eight_bit().Adam8bit(module.parameters(), **options)  # type: ignore[no-any-return]
    return torch.optim.Adam(module.parameters(), **options)


def eight_bit() -> Any:
    """bitsandbytes' optimisers: averages in blocks of 256 at 8 bits, tensors below 4 096 numbers left in float32.

    Dettmers et al. 2022. Raises UserError where it is not installed, or does not load here.
    """
    try:
        from bitsandbytes import optim
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"optimizer = 'adamw8bit' needs bitsandbytes, which does not load here ({error}): pip install "
            "'diffusion2gan[adam8bit]', or set optimizer=adamw."
        ) from error
    return optim
