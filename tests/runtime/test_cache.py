"""Tensors that are computed once and kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion2gan.errors import Failure
from diffusion2gan.runtime.cache import load_or_compute


def test_tensors_are_computed_once_per_file_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "x.safetensors"
    calls: list[float] = []

    def compute(value: float) -> dict[str, Tensor]:
        calls.append(value)
        return {"x": torch.tensor([value])}

    first = load_or_compute(path, {"prompts": ["a"]}, lambda: compute(1.0))
    again = load_or_compute(path, {"prompts": ["a"]}, lambda: compute(2.0))
    assert torch.equal(first["x"], again["x"])
    assert calls == [1.0]

    # Other metadata: the file is written anew
    other = load_or_compute(path, {"prompts": ["b"]}, lambda: compute(3.0))
    assert other["x"].item() == 3.0
    assert load_or_compute(path, {"prompts": ["b"]}, lambda: compute(4.0))["x"].item() == 3.0
    assert calls == [1.0, 3.0]


def test_a_failed_computation_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        load_or_compute(tmp_path / "x.safetensors", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"cut off")
    with pytest.raises(Failure, match="damaged"):
        load_or_compute(path, {}, lambda: {"x": torch.zeros(1)})
