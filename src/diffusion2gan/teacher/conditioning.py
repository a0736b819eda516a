"""The text conditioning of a denoising network: the same few named tensors for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of B prompts. Only `prompt_embeds` is always present.

    - `prompt_embeds` [B, T, D]: the encoded tokens.
    - `pooled_prompt_embeds` [B, P]: SDXL, SD3 and Flux.
    - `time_ids` [B, 6]: SDXL's image sizes and crop in pixels.
    - `prompt_attention_mask` [B, T]: Sana.
    - `guidance` [B]: the guidance scale for a guidance-distilled Flux; 0 if absent.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    guidance: Tensor | None = None

    @classmethod
    def concat(cls, *conditionings: Conditioning) -> Conditioning:
        """All rows in order. The conditionings must have the same tensors."""
        joined = {}
        for name in conditionings[0].tensors():
            joined[name] = torch.cat([cond.tensors()[name] for cond in conditionings])
        return cls(**joined)

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        present = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                present[field.name] = tensor
        return present

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Applies a function to each tensor."""
        return Conditioning(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def rows(self, rows: slice) -> Conditioning:
        return self.map(lambda tensor: tensor[rows])

    def expand(self, count: int) -> Conditioning:
        """Repeats a single row `count` times without a copy."""
        return self.map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> Conditioning:
        """On a device, or in a dtype."""
        return self.map(lambda tensor: tensor.to(device_or_dtype))

    def with_guidance(self, guidance_scale: float) -> Conditioning:
        """The same conditioning with a guidance scale for the network."""
        return replace(self, guidance=self.prompt_embeds.new_full((len(self),), guidance_scale))
