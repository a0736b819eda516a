"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffusion2gan.runtime import fsdp

GROUP_SIZE = 64  # tensors that are updated together


class EMA:
    """Exponential moving average of a module's weights: `shadow ← decay·shadow + (1−decay)·weight`.

    After n updates the decay is min(decay, (1+n)/(10+n)), so that the initial weights are soon
    forgotten. Integer buffers (batch norm's counter) are copied, not averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._num_updates: int | Tensor = 0  # a tensor while only the device has the number
        self.shadow = {key: value.detach().clone() for key, value in module.state_dict().items()}

    @property
    def num_updates(self) -> int:
        """The number of updates so far. The host may have to wait for the device."""
        self._num_updates = int(self._num_updates)
        return self._num_updates

    @torch.no_grad()
    def update(self, module: nn.Module, skipped: Tensor | bool = False) -> None:
        """Moves the average towards the module's present weights.

        `skipped`: a scalar on the weights' device, 1 if this update does not take place and else 0;
        the host does not wait for it.
        """
        averaged: list[Tensor] = []
        weights: list[Tensor] = []
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                averaged.append(fsdp.local_shard(self.shadow[key]))
                weights.append(fsdp.local_shard(value))
            else:
                self.shadow[key].copy_(value)

        if isinstance(skipped, Tensor):
            self._update_on_device(averaged, weights, skipped)
            return
        self._num_updates = self.num_updates + 1
        decay = min(self.decay, (1 + self._num_updates) / (10 + self._num_updates))
        torch._foreach_lerp_(averaged, weights, 1 - decay)

    def _update_on_device(
        self, averaged: list[Tensor], weights: list[Tensor], skipped: Tensor
    ) -> None:
        """As `update`, where only the device has `skipped`, and so the number of updates."""
        num_updates = self._num_updates + 1 - skipped.double()
        decay = ((1 + num_updates) / (10 + num_updates)).clamp(max=self.decay)
        weight = ((1 - decay) * (1 - skipped.double())).float()
        self._num_updates = num_updates

        # In groups, so that the differences need little memory
        for start in range(0, len(weights), GROUP_SIZE):
            group = averaged[start : start + GROUP_SIZE]
            differences = torch._foreach_sub(weights[start : start + GROUP_SIZE], group)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(group, differences)

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Continues from full tensors; a sharded average keeps this rank's shard of each."""
        self._num_updates = num_updates
        for key, value in state.items():
            current = self.shadow[key]
            self.shadow[key] = fsdp.shard_like(value.to(current.device), current)
