"""Adam for student and discriminator: torch's, or bitsandbytes' with its two averages in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import fsdp

BETAS = (0.9, 0.99)
DISCRIMINATOR_BETAS = (0.0, 0.99)  # no momentum: the discriminator's target moves


def student_optimizer(recipe: Recipe, module: nn.Module) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019); on a GPU fused, see `is_fused`.

    Raises UserError if the recipe sets 8 bits and bitsandbytes is not installed.
    """
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": BETAS,
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adamw8bit":
        optimizer: Optimizer = import_8bit_optimizers().AdamW8bit(module.parameters(), **options)
        return optimizer
    return torch.optim.AdamW(module.parameters(), fused=is_fused(module), **options)


def discriminator_optimizer(recipe: Recipe, module: nn.Module) -> Optimizer:
    """Adam without momentum, in 8 bits if the student's is. Raises as `student_optimizer` does."""
    options: dict[str, Any] = {
        "lr": recipe.discriminator_learning_rate,
        "betas": DISCRIMINATOR_BETAS,
    }
    if recipe.optimizer == "adamw8bit":
        optimizer: Optimizer = import_8bit_optimizers().Adam8bit(module.parameters(), **options)
        return optimizer
    return torch.optim.Adam(module.parameters(), fused=is_fused(module), **options)


def is_fused(module: nn.Module) -> bool | None:
    """Whether the update of all parameters is one kernel; None leaves torch's default.

    On a GPU it is. Such an update can skip gradients that are not finite without the host (see
    `clip_and_step`). Sharded parameters need the host for their norm in any case.
    """
    on_gpu = next(module.parameters()).device.type == "cuda"
    return True if on_gpu and not fsdp.is_sharded(module) else None


def import_8bit_optimizers() -> Any:
    """bitsandbytes' optimisers (Dettmers et al. 2022).

    Averages are 8-bit, in blocks of 256; tensors with fewer than 4 096 elements stay in float32.
    Raises UserError if it is not installed, or cannot be loaded on this machine.
    """
    try:
        from bitsandbytes import optim
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            "optimizer = 'adamw8bit' needs bitsandbytes, which cannot be loaded on this machine "
            f"({error}). Install it: pip install 'diffusion2gan[adam8bit]', or set optimizer=adamw."
        ) from error
    return optim
