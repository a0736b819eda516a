"""Digests of weights: computed when they are written, compared when they are read.

A checkpoint has them in its header, an export in `diffusion2gan.json`. Files without a digest, of
earlier versions or other programs, are not checked. DIFFUSION2GAN_VERIFY=0 in the environment skips
all checks, which read every byte once more than loading does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from diffusion2gan.errors import Failure
from diffusion2gan.runtime.environment import env_number
from diffusion2gan.runtime.files import NUM_HASH_THREADS, hash_files

VARIABLE = "DIFFUSION2GAN_VERIFY"
MIN_THREADED_BYTES = 2**22
NUM_DIGITS = 16  # of a digest in messages


def is_verifying() -> bool:
    """Whether digests are compared: unless DIFFUSION2GAN_VERIFY is 0."""
    return env_number(VARIABLE, 1) != 0


def hash_text(text: str) -> str:
    """The sha256 of a text, as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over the name, type, shape and sha256 of each tensor, in the order of names.

    The tensors are on the CPU.
    """
    names = sorted(tensors)
    values = [tensors[name] for name in names]
    if sum(value.nbytes for value in values) < MIN_THREADED_BYTES:
        digests = [_hash_tensor(value) for value in values]
    else:
        with ThreadPoolExecutor(NUM_HASH_THREADS) as pool:
            digests = list(pool.map(_hash_tensor, values))

    lines = []
    for name, digest in zip(names, digests, strict=True):
        lines.append(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {digest}\n")
    return hash_text("".join(lines))


def _hash_tensor(tensor: Tensor) -> str:
    values = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


def describe_difference(found: str, written: str) -> str:
    """For messages: both digests."""
    return (
        f"its contents have the sha256 {found[:NUM_DIGITS]}…, and had {written[:NUM_DIGITS]}… when "
        "they were written"
    )


def check_files(folder: Path, written: Mapping[str, str], remedy: str) -> None:
    """Raises Failure if a file in `folder` differs from its digest in `written` {name: sha256}.

    Missing files are ignored. The message ends with `remedy`.
    """
    if not is_verifying():
        return
    existing = [name for name in written if (folder / name).is_file()]
    for name, digest in hash_files(folder, existing).items():
        if digest != written[name]:
            difference = describe_difference(digest, written[name])
            raise Failure(f"{folder / name} is damaged ({difference}). {remedy}")
