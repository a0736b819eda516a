"""What a network is told of its prompts: the same few named tensors for every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Of B prompts: `prompt_embeds` [B, T, D], and what else the family has; all but it may be absent.

    `pooled_prompt_embeds` [B, P] (SDXL, SD3, Flux); `time_ids` [B, 6], SDXL's sizes in pixels; `prompt_attention_mask`
    [B, T], Sana's; `guidance` [B], the guidance scale that a guidance-distilled Flux reads (absent: 0).
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    guidance: Tensor | None = None

    @classmethod
    def concat(cls, *parts: Conditioning) -> Conditioning:
        """All rows of all parts, in order; every part has the same tensors."""
        joined = {
            name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()
        }
        return cls(**joined)

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(tensor) for name, tensor in self.tensors().items()})

    def rows(self, rows: slice) -> Conditioning:
        return self.each(lambda tensor: tensor[rows])

    def expand(self, count: int) -> Conditioning:
        """One row, seen `count` times without a copy."""
        return self.each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device: torch.device | str) -> Conditioning:
        return self.each(lambda tensor: tensor.to(device))

    def with_guidance(self, guidance_scale: float) -> Conditioning:
        """The same, told of a guidance scale."""
        return replace(self, guidance=self.prompt_embeds.new_full((len(self),), guidance_scale))
