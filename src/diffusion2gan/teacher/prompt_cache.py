"""Prompt embeddings on disk, computed once, so that training needs no text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import atomic_write
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.conditioning import Conditioning

PROMPTS_PER_FILE = 128


class PromptCache:
    """Reads the Conditioning that `encode` computed for prompts, in float32 on the CPU.

    Creating the cache computes the files that are missing. Each is written atomically, so an
    interrupted start resumes. A prompt takes the bytes of its tensors in `dtype`.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        encode: Callable[[list[str]], Conditioning],
        dtype: torch.dtype = torch.float16,
    ) -> None:
        # Memory-mapped tensors of the files that have been read, by name
        self._files: dict[Path, dict[str, Tensor]] = {}

        # Where each prompt is stored: path and row
        unique = list(dict.fromkeys(prompts))
        self._location: dict[str, tuple[Path, int]] = {}
        missing: list[tuple[Path, list[str]]] = []
        num_missing = 0
        for start in range(0, len(unique), PROMPTS_PER_FILE):
            chunk = unique[start : start + PROMPTS_PER_FILE]
            path = folder / _file_name(chunk)
            for row, prompt in enumerate(chunk):
                self._location[prompt] = (path, row)
            if not path.exists():
                missing.append((path, chunk))
                num_missing += len(chunk)

        # Encode what is not on disk yet
        if missing:
            with Bar("prompts", len(unique), len(unique) - num_missing) as bar:
                for path, chunk in missing:
                    _write(path, encode(chunk), dtype)
                    bar.advance(len(chunk))

    def read(self, prompts: Sequence[str]) -> Conditioning:
        """The stored rows of `prompts`, in order. Raises UserError if a prompt is not stored."""
        rows: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            if prompt not in self._location:
                raise UserError(
                    f"the cache has no embedding of the prompt {prompt!r}; "
                    "set prompt_embeds=encoded to encode prompts during training"
                )
            path, row = self._location[prompt]
            for name, tensor in self._open(path).items():
                rows.setdefault(name, []).append(tensor[row])
        return Conditioning(**{name: torch.stack(values).float() for name, values in rows.items()})

    def _open(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, mapped into memory: only the rows that are used are read."""
        tensors = self._files.get(path)
        if tensors is None:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._files[path] = tensors
        return tensors


def _file_name(prompts: list[str]) -> str:
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return f"{digest[:16]}.safetensors"


def _write(path: Path, cond: Conditioning, dtype: torch.dtype) -> None:
    """Stores a Conditioning in `dtype`. Raises UserError if a value overflows."""
    tensors = {name: tensor.to(dtype) for name, tensor in cond.tensors().items()}
    if cond.time_ids is not None:
        # Sizes in pixels: float16 does not represent all integers above 2048
        tensors["time_ids"] = cond.time_ids.float()
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(
            f"prompt embeddings are too large for {dtype}; "
            "set prompt_embeds=encoded to encode prompts during training"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)
