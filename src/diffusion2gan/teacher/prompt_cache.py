"""Prompt embeddings computed once and kept on disk, so that training needs no text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import atomic_write
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.conditioning import Conditioning

PROMPTS_PER_FILE = 128


class PromptCache:
    """`read(prompts)` → the Conditioning that `encode` gave them, in float32 on the CPU.

    Missing files are written at birth, whole or not at all, so an interrupted start continues; a prompt takes as many
    bytes as its tensors in `dtype`.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        encode: Callable[[list[str]], Conditioning],
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self._folder = folder
        unique = list(dict.fromkeys(prompts))
        parts = [unique[i : i + PROMPTS_PER_FILE] for i in range(0, len(unique), PROMPTS_PER_FILE)]
        self._names = [
            f"{hashlib.sha256(chr(10).join(part).encode()).hexdigest()[:16]}.safetensors"
            for part in parts
        ]
        self._place = {
            prompt: (i, j) for i, part in enumerate(parts) for j, prompt in enumerate(part)
        }
        missing = [i for i, name in enumerate(self._names) if not (folder / name).exists()]
        if missing:
            with Bar(
                "prompts", len(unique), len(unique) - sum(len(parts[i]) for i in missing)
            ) as bar:
                for i in missing:
                    self._write(folder / self._names[i], encode(parts[i]), dtype)
                    bar.advance(len(parts[i]))

    def _write(self, path: Path, cond: Conditioning, dtype: torch.dtype) -> None:
        sizes = cond.time_ids  # whole numbers above 2048 are not all float16
        kept = {name: tensor.to(dtype) for name, tensor in cond.tensors().items()}
        kept |= {} if sizes is None else {"time_ids": sizes.float()}
        folded = {name: tensor.contiguous().cpu() for name, tensor in kept.items()}
        if not all(tensor.isfinite().all() for tensor in folded.values()):
            raise UserError(f"prompt embeddings do not fit into {dtype}; set prompt_embeds=encoded")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(folded, temporary)

    def read(self, prompts: Sequence[str]) -> Conditioning:
        rows = []
        for prompt in prompts:
            if prompt not in self._place:
                raise UserError(
                    f"no embedding is kept of the prompt {prompt!r}; set prompt_embeds=encoded"
                )
            file, row = self._place[prompt]
            with safe_open(self._folder / self._names[file], framework="pt") as kept:
                names = list(kept.keys())
                rows.append(
                    Conditioning(
                        **{name: kept.get_slice(name)[row : row + 1].float() for name in names}
                    )
                )
        return Conditioning.concat(*rows)
