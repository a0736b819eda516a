"""The numbers of a step that are logged, read from the device all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.runtime.transfer import HostCopy


class StepMetrics:
    """A log entry whose numbers may still be on their way from a GPU to the host.

    `entry`: the values by name. Tensors without a dimension become numbers, those with one become
    lists; all are copied as one tensor. Other values are kept. Reading them a step later lets the
    GPU compute that step meanwhile.
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = entry
        self._tensors = {key: x for key, x in entry.items() if isinstance(x, Tensor)}
        self._numbers: HostCopy | None = None
        if self._tensors:
            # float64 holds every float32 exactly
            flat = [tensor.detach().double().flatten() for tensor in self._tensors.values()]
            self._numbers = HostCopy(torch.cat(flat))

    def read(self) -> dict[str, Any]:
        """The log entry as numbers. Waits until they have arrived."""
        if self._numbers is None:
            return dict(self.entry)
        numels = [tensor.numel() for tensor in self._tensors.values()]
        pieces = dict(zip(self._tensors, self._numbers.read().split(numels), strict=True))

        values: dict[str, Any] = {}
        for key, value in self.entry.items():
            if key not in pieces:
                values[key] = value
            elif value.ndim == 0:
                values[key] = float(pieces[key])
            else:
                values[key] = pieces[key].tolist()
        return values
