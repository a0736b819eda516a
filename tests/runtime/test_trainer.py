"""The training loop: interrupted and run again, it ends with the same bits."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distill.rank_processes import torchrun, wait_for_success
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion2gan.errors import Failure
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime import trainer as module_fit
from diffusion2gan.runtime.trainer import FitConfig, fit, learning_rate

NUM_SAMPLES, BATCH = 48, 4


def tiny() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
    )


def noisy_loss(
    net: nn.Module, calls: list[range], stop_at: int | None = None
) -> Callable[[range], Tensor]:
    """A loss with randomness of its own, that a user interrupts at call `stop_at`."""

    def loss(numbers: range) -> Tensor:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(numbers)
        x = torch.randn(len(numbers), 3)
        target = x.sum(1, keepdim=True) + torch.tensor([[float(n)] for n in numbers]) / 50
        return (net(x) - target).square().mean()

    return loss


def train(folder: Path, stop_at: int | None = None, seed: int = 5) -> tuple[nn.Module, list[range]]:
    net, calls = tiny(), []
    done = fit(
        "stage",
        net,
        noisy_loss(net, calls, stop_at),
        FitConfig(NUM_SAMPLES, BATCH, peak_lr=0.05, seed=seed, ema_decay=0.9),
        folder,
    )
    return done, calls


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("stop_at", [1, 7])
def test_an_interrupted_stage_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    monkeypatch.setattr(module_fit, "CHECKPOINT_EVERY_S", 0.0)
    uninterrupted, calls = train(tmp_path / "uninterrupted")
    assert calls == [range(i, i + BATCH) for i in range(0, NUM_SAMPLES, BATCH)]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=stop_at)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["stage.safetensors"]
    resumed, rest = train(tmp_path / "cut")
    assert rest == calls[stop_at:]
    assert same(uninterrupted, resumed)
    assert not same(uninterrupted, train(tmp_path / "other", seed=6)[0])  # the comparison can fail


def test_steps_since_the_last_checkpoint_are_repeated(tmp_path: Path) -> None:
    """Before the first checkpoint, after two minutes, a stage starts again, to the same result."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at=5)
    assert not (tmp_path / "cut").exists() or not list((tmp_path / "cut").iterdir())
    resumed, calls = train(tmp_path / "cut")
    assert len(calls) == NUM_SAMPLES // BATCH and same(
        resumed, train(tmp_path / "uninterrupted")[0]
    )


def test_a_finished_stage_is_loaded_without_training(tmp_path: Path) -> None:
    first, _ = train(tmp_path)
    again, calls = train(tmp_path)
    assert calls == [] and same(first, again)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_the_result_has_the_ema_weights(tmp_path: Path) -> None:
    """Against the recursion written out: w ← w + (1 − decay_n)(parameter − w)."""
    net, calls, seen = tiny(), [], []
    inner = noisy_loss(net, calls)

    def loss(numbers: range) -> Tensor:
        seen.append(net[0].weight.detach().double().clone())  # before each update
        return inner(numbers)

    averaged = fit(
        "stage",
        net,
        loss,
        FitConfig(NUM_SAMPLES, BATCH, peak_lr=0.05, seed=5, ema_decay=0.9),
        tmp_path,
    )[0].weight
    from diffusion2gan.runtime import checkpoint

    tensors, meta = checkpoint.load(tmp_path / "stage.safetensors")
    assert meta == {"pictures_seen": NUM_SAMPLES, "num_updates": len(seen)}
    expected = seen[0]
    for n, parameter in enumerate([*seen[1:], tensors["module/0.weight"].double()], 1):
        expected = expected + (1 - min(0.9, (1 + n) / (10 + n))) * (parameter - expected)
    torch.testing.assert_close(averaged.double(), expected, rtol=0, atol=1e-6)


def test_a_linear_function_is_learned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    weights = torch.tensor([[1.0, -2.0, 0.5]])

    def loss(numbers: range) -> Tensor:
        x = torch.randn(len(numbers), 3)
        return (net(x) - x @ weights.T - 1).square().mean()

    fit(
        "line",
        net,
        loss,
        FitConfig(num_samples=8000, batch_size=16, peak_lr=0.05, seed=0, ema_decay=0.9),
        tmp_path,
    )
    torch.testing.assert_close(net.weight, weights, rtol=0, atol=0.03)
    torch.testing.assert_close(net.bias, torch.ones(1), rtol=0, atol=0.03)


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    assert learning_rate(0.0, 2.0) == 0
    assert learning_rate(0.015, 2.0) == pytest.approx(1.0)
    assert learning_rate(0.03, 2.0) == pytest.approx(2.0)
    assert learning_rate(0.03 + 0.97 / 2, 2.0) == pytest.approx(1.0)
    assert learning_rate(0.03 + 0.97 / 4, 2.0) == pytest.approx(1 + math.sqrt(0.5))
    assert learning_rate(1.0, 2.0) == pytest.approx(0.0, abs=1e-12)
    rates = [learning_rate(i / 1000, 1.0) for i in range(30, 1001)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert learning_rate(0.0, 1.0, warmup=0.0) == 1.0


RANKED = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
from runtime.test_trainer import BATCH, NUM_SAMPLES, noisy_loss, tiny
from diffusion2gan.runtime.trainer import FitConfig, fit
from diffusion2gan.runtime.distributed import connect_ranks
out = Path(sys.argv[1])
with connect_ranks(torch.device("cpu")) as group:
    net = tiny()
    config = FitConfig(NUM_SAMPLES, BATCH, peak_lr=0.05, seed=5, ema_decay=0.9)
    done = fit("stage", net, noisy_loss(net, []), config, out, group=group)
    save_file(done.state_dict(), out / f"rank{group.ranks.rank}.safetensors")
"""


@pytest.mark.slow
def test_two_ranks_average_gradients_and_batch_norm_buffers(tmp_path: Path) -> None:
    """Against one process that computes both halves of each batch from one state, and averages."""
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    wait_for_success(torchrun(2, script, tmp_path, Path(__file__).parents[1]))
    ours, other = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    net, half = tiny().train(), BATCH // 2
    loss, optimizer = (
        noisy_loss(net, []),
        torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.01),
    )
    shadow = {key: value.clone() for key, value in net.state_dict().items()}
    for n, seen in enumerate(range(0, NUM_SAMPLES, BATCH), 1):
        optimizer.param_groups[0]["lr"] = learning_rate(seen / NUM_SAMPLES, 0.05)
        before, after, gradients = copy.deepcopy(net.state_dict()), [], []
        for start in (seen, seen + half):
            net.load_state_dict(before)
            optimizer.zero_grad()
            torch.manual_seed(hash((5, start)) % 2**31)
            loss(range(start, start + half)).backward()
            gradients.append([p.grad.clone() for p in net.parameters()])
            after.append([buffer.clone() for buffer in net.buffers()])
        for p, one, two in zip(net.parameters(), *gradients, strict=True):
            p.grad = (one + two) / 2
        for buffer, one, two in zip(net.buffers(), *after, strict=True):
            buffer.copy_((one + two) / 2)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        weight = 1 - min(0.9, (1 + n) / (10 + n))
        for key, value in net.state_dict().items():
            shadow[key] = (
                value.clone() if value.dtype == torch.int64 else shadow[key].lerp(value, weight)
            )
    for key, value in shadow.items():
        assert torch.equal(ours[key], other[key]) and torch.allclose(
            ours[key], value, rtol=1e-5, atol=1e-6
        ), key


def test_training_that_diverges_ends_and_keeps_the_last_finite_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_fit, "CHECKPOINT_EVERY_S", 0.0)
    net, calls = tiny(), []
    inner = noisy_loss(net, calls)

    def loss(numbers: range) -> Tensor:
        return inner(numbers) * (math.nan if len(calls) == 5 else 1.0)

    config = FitConfig(NUM_SAMPLES, BATCH, peak_lr=0.05, seed=5)
    with pytest.raises(Failure, match=r"NaN or infinity .*diverged.*unchanged"):
        fit("stage", net, loss, config, tmp_path)
    tensors, meta = checkpoint.load(tmp_path / "stage.safetensors")
    assert meta["pictures_seen"] == 4 * BATCH
    assert all(bool(value.isfinite().all()) for value in tensors.values())
