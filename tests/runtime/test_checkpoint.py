"""Checkpoints and the moving average, against hand-rolled ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.ema import EMA


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def adam(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.99))


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    module(x).square().sum().backward()
    optimizer.step()


def test_ema_matches_the_recursion_written_out() -> None:
    module, decay = network(), 0.6
    ema, optimizer = EMA(module, decay), adam(module)
    expected = {key: value.double() for key, value in module.state_dict().items()}
    for n in range(1, 20):
        step(module, optimizer, n)
        ema.update(module)
        d = min(decay, (1 + n) / (10 + n))
        for key, value in module.state_dict().items():
            counted = not value.is_floating_point()
            expected[key] = (
                value.double() if counted else d * expected[key] + (1 - d) * value.double()
            )
    assert ema.num_updates == 19 and (1 + 4) / (10 + 4) < decay < (1 + 19) / (10 + 19)
    for key, value in ema.shadow.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    assert int(ema.shadow["1.num_batches_tracked"]) == 19
    assert all(
        ema.shadow[key].data_ptr() != value.data_ptr() for key, value in module.state_dict().items()
    )


def test_training_resumed_from_a_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    module = network()
    optimizer = adam(module)
    for seed in range(3):
        step(module, optimizer, seed)
    path = tmp_path / "c.safetensors"
    tensors = checkpoint.pack("net", module) | checkpoint.pack_optimizer("adam", optimizer)
    checkpoint.save(path, tensors, {"pairs_seen": 3, "note": "ü"})
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]

    again, (loaded, meta) = network(seed=9), checkpoint.load(path)
    assert meta == {"pairs_seen": 3, "note": "ü"}
    assert loaded.keys() == tensors.keys() and all(
        torch.equal(loaded[k], tensors[k]) for k in tensors
    )
    again.load_state_dict(checkpoint.unpack("net", loaded))
    optimizer_again = adam(again)
    checkpoint.unpack_optimizer("adam", optimizer_again, loaded)
    for seed in range(3, 6):
        step(module, optimizer, seed)
        step(again, optimizer_again, seed)
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_unpack_distinguishes_names_with_a_common_prefix(tmp_path: Path) -> None:
    a, b = network(1), network(2)
    packed = checkpoint.pack("net", a) | checkpoint.pack("network", b)
    assert torch.equal(checkpoint.unpack("net", packed)["0.weight"], a[0].weight)
    assert checkpoint.unpack("network", packed).keys() == b.state_dict().keys()


def test_a_damaged_checkpoint_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, checkpoint.pack("net", network()), {})
    content = path.read_bytes()
    for damaged in (
        b"",
        content[:5],
        content[:100],
        content[:-1],
        b"\xff" * 8 + content[8:],
        content[:9] + b"?" * 50,
    ):
        path.write_bytes(damaged)
        with pytest.raises(Failure, match=r"c\.safetensors is damaged.*move it away"):
            checkpoint.load(path)
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(tmp_path / "none")


def test_checkpoint_that_cannot_be_read_is_not_reported_as_missing_or_damaged(
    tmp_path: Path,
) -> None:
    looped = tmp_path / "looped.safetensors"
    looped.symlink_to(looped)
    with pytest.raises(Failure, match=r"cannot be read \(Too many levels .*may be intact"):
        checkpoint.load(looped)
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("header", ["[1]", "3", "null", "{", "[" * 100_000])
def test_odd_header_is_damage(header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, path, {"meta": header})
    with pytest.raises(Failure, match=r"a\.safetensors is damaged .*move it away"):
        checkpoint.load(path)
    with pytest.raises(Failure, match=r"a\.safetensors is damaged"):
        checkpoint.meta(path)


def test_numbers_that_are_not_finite_are_found_in_every_floating_type() -> None:
    tensors = {"empty": torch.zeros(0), "scalar": torch.tensor(1.0), "integers": torch.arange(3)}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        good = torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype)
        tensors[f"{dtype} good"] = good
        for value in (math.nan, math.inf, -math.inf):
            bad = good.clone()
            bad[2, 1] = value
            tensors[f"{dtype} {value}"] = bad
    expected = [key for key in tensors if key.endswith(("nan", "inf"))]
    assert len(expected) == 12
    assert checkpoint.find_non_finite(tensors) == expected
    assert checkpoint.find_non_finite({}) == []
