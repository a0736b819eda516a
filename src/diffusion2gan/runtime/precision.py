"""The precision of float32 kernels: TF32 for the networks, full float32 for what needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_matmul(device_type: str) -> Iterator[None]:
    """Inside the block, matrix products in float32 may use TF32 on a GPU, as convolutions do.

    `full_float32` takes precedence inside of it.
    """
    matmul_precision = torch.get_float32_matmul_precision()
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Inside the block, autocast is off and float32 kernels use all 23 bits of the mantissa.

    On a GPU, convolutions in float32 otherwise use TF32, with a mantissa of 10 bits: torch's
    default for cuDNN. Matrix products too, if the user allowed it. The settings are global and
    apply when a kernel is launched: a backward pass after the block has the user's again.
    """
    cudnn_allows_tf32 = torch.backends.cudnn.allow_tf32
    matmul_precision = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn_allows_tf32
        torch.set_float32_matmul_precision(matmul_precision)
