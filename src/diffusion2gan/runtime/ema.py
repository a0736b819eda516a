"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffusion2gan.runtime import fsdp


class EMA:
    """Exponential moving average of a module's weights: `shadow ← decay·shadow + (1−decay)·weight`.

    After n updates the decay is min(decay, (1+n)/(10+n)), so that the initial weights are soon
    forgotten. Integer buffers (batch norm's counter) are copied, not averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow = {key: value.detach().clone() for key, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module's present weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weight = 1 - decay

        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.shadow[key].lerp_(value, weight)
            else:
                self.shadow[key].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Continues from full tensors; a sharded average keeps this rank's shard of each."""
        self.num_updates = num_updates
        for key, value in state.items():
            current = self.shadow[key]
            self.shadow[key] = fsdp.shard_like(value.to(current.device), current)
