"""Float32 without TF32: the settings inside the block, and the user's again after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from diffusion2gan.runtime.precision import full_float32


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    allow_tf32 = torch.backends.cudnn.allow_tf32
    matmul_precision = torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.set_float32_matmul_precision(matmul_precision)


@pytest.mark.parametrize("cudnn_allows_tf32", [True, False])
@pytest.mark.parametrize("matmul_precision", ["highest", "high", "medium"])
def test_tf32_and_autocast_are_off_inside_and_restored_after_an_error(
    cudnn_allows_tf32: bool, matmul_precision: str
) -> None:
    torch.backends.cudnn.allow_tf32 = cudnn_allows_tf32
    torch.set_float32_matmul_precision(matmul_precision)

    with torch.autocast("cpu", torch.bfloat16):
        with suppress(ZeroDivisionError), full_float32("cpu"):
            assert not torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_autocast_enabled("cpu")
            raise ZeroDivisionError
        assert torch.is_autocast_enabled("cpu")

    assert torch.backends.cudnn.allow_tf32 is cudnn_allows_tf32
    assert torch.get_float32_matmul_precision() == matmul_precision
