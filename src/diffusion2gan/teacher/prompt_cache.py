"""Prompt embeddings on disk, computed once, so that training needs no text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime import checkpoint, integrity
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.conditioning import Conditioning

PROMPTS_PER_FILE = 128
ROW_DIGESTS = "prompts_sha256"  # the header's key for the digests of the prompts


@dataclass
class _File:
    """The tensors of a file, mapped into memory: only the rows that are used are read.

    Each row is compared with its digest when it is read for the first time.
    """

    path: Path
    tensors: dict[str, Tensor]
    digests: list[str] | None
    checked: set[int] = field(default_factory=set)

    def read(self, row: int) -> dict[str, Tensor]:
        """A prompt's tensors as they are stored. Raises Failure if its digest differs."""
        if self.digests is not None and row not in self.checked and integrity.is_verifying():
            found = _hash_row(self.tensors, row)
            if found != self.digests[row]:
                difference = integrity.describe_difference(found, self.digests[row])
                raise checkpoint.damaged(self.path, f"prompt {row}: {difference}")
            self.checked.add(row)
        return {name: tensor[row] for name, tensor in self.tensors.items()}


def _hash_row(tensors: dict[str, Tensor], row: int) -> str:
    return integrity.hash_tensors({name: tensor[row] for name, tensor in tensors.items()})


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
        # The files that have been read
        self._files: dict[Path, _File] = {}

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
            for name, tensor in self._open(path).read(row).items():
                rows.setdefault(name, []).append(tensor)
        return Conditioning(**{name: torch.stack(values).float() for name, values in rows.items()})

    def _open(self, path: Path) -> _File:
        if path not in self._files:
            with checkpoint.open_checkpoint(path) as (file, header, _):
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._files[path] = _File(path, tensors, header.get(ROW_DIGESTS))
        return self._files[path]


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

    # A digest per prompt, because prompts are read one by one
    num_rows = len(next(iter(tensors.values())))
    digests = [_hash_row(tensors, row) for row in range(num_rows)]
    checkpoint.save(path, tensors, {ROW_DIGESTS: digests})
