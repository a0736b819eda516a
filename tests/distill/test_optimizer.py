"""Adam in 8 bits: nearly Adam's updates, a quarter of its memory, and exact resuming."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion2gan.cost.distill import dry_run
from diffusion2gan.distill import train
from diffusion2gan.distill.memory import adam_bytes
from diffusion2gan.distill.optimizer import discriminator_optimizer, student_optimizer
from diffusion2gan.distill.run import CHECKPOINT
from diffusion2gan.distill.steps import clip_and_step
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.ema import EMA
from diffusion2gan.teacher.loading import load_teacher

PROMPTS = ["a star", "two stars", "a red ring", "a star"]

BuildOptimizer = Callable[[Recipe, nn.Module], Optimizer]


def require_bitsandbytes() -> None:
    pytest.importorskip(
        "bitsandbytes", reason="needs the extra [adam8bit]; it slows every start of diffusers"
    )


def test_missing_bitsandbytes_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"pip install 'diffusion2gan\[adam8bit\]', or set optimizer=adamw"
    ):
        student_optimizer(Recipe(optimizer="adamw8bit"), nn.Linear(2, 2))


def test_default_optimizers_are_those_of_torch() -> None:
    assert type(student_optimizer(Recipe(), nn.Linear(2, 2))) is torch.optim.AdamW
    assert type(discriminator_optimizer(Recipe(), nn.Linear(2, 2))) is torch.optim.Adam


@pytest.mark.parametrize("fused", [True, None])
def test_gradient_that_is_not_finite_changes_nothing(fused: bool | None) -> None:
    """On a GPU the fused optimiser decides that itself; torch has it on the CPU too."""
    layers = []
    for gradients in ([0.1, 0.2, 0.3], [0.1, float("nan"), 0.2, float("inf"), 0.3]):
        torch.manual_seed(1)
        layer = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=fused)
        ema = EMA(layer, 0.9)
        for gradient in gradients:
            for parameter in layer.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            norm, skipped = clip_and_step(optimizer, layer.parameters(), 0.01, 1.0)
            assert bool(norm.isfinite()) == (not bool(skipped))
            assert isinstance(skipped, Tensor) == bool(fused)
            if skipped is not True:
                ema.update(layer, skipped)
        layers.append((layer, optimizer, ema))

    # Weights, Adam's averages and counts, and the average of the weights
    (layer, optimizer, ema), (other_layer, other_optimizer, other_ema) = layers
    assert ema.num_updates == other_ema.num_updates == 3
    tensors = {**layer.state_dict(), **checkpoint.pack_optimizer("adam", optimizer)}
    others = {**other_layer.state_dict(), **checkpoint.pack_optimizer("adam", other_optimizer)}
    for key, value in [*tensors.items(), *checkpoint.pack("ema", ema).items()]:
        expected = others[key] if key in others else other_ema.shadow[key.removeprefix("ema/")]
        assert torch.equal(value, expected), key


def test_average_on_the_device_is_that_on_the_host() -> None:
    module = nn.Linear(3, 3)
    on_host = EMA(module, 0.8)
    on_device = EMA(module, 0.8)
    for seed in range(40):
        torch.manual_seed(seed)
        with torch.no_grad():
            module.weight.normal_()
        on_host.update(module)
        on_device.update(module, torch.tensor(0.0))
        torch.testing.assert_close(on_device.shadow["weight"], on_host.shadow["weight"])
    assert on_device.num_updates == on_host.num_updates == 40


def train_layer(build: BuildOptimizer, recipe: Recipe) -> tuple[Tensor, list[float], int]:
    """The change of a linear layer's weights in 30 updates, the losses, the optimiser's bytes."""
    torch.manual_seed(1)
    layer = nn.Linear(96, 96)
    optimizer = build(recipe, layer)
    initial = layer.weight.detach().clone()

    losses = []
    data = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(data) - data.flip(1)).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()

    num_bytes = 0
    for key, tensor in checkpoint.pack_optimizer("adam", optimizer).items():
        if "qmap" not in key and "step" not in key:
            num_bytes += tensor.numel() * tensor.element_size()
    assert num_bytes == adam_bytes(recipe, layer)  # as a dry run computes it
    return layer.weight.detach() - initial, losses, num_bytes


@pytest.mark.parametrize("build", [student_optimizer, discriminator_optimizer])
def test_8bit_updates_are_nearly_those_of_adam(build: BuildOptimizer) -> None:
    require_bitsandbytes()
    rates: dict[str, Any] = {"learning_rate": 1e-3, "discriminator_learning_rate": 1e-3}
    change, losses, num_bytes = train_layer(build, Recipe(**rates))
    change_8bit, losses_8bit, num_bytes_8bit = train_layer(
        build, Recipe(optimizer="adamw8bit", **rates)
    )

    assert not torch.equal(change_8bit, change)
    similarity = torch.cosine_similarity(change_8bit.flatten(), change.flatten(), 0)
    assert float(similarity) > 0.99
    assert losses[-1] < 0.95 * losses[0]
    assert losses_8bit[-1] == pytest.approx(losses[-1], rel=0.01)
    assert num_bytes_8bit < 0.28 * num_bytes


def test_8bit_run_resumes_exactly(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_bitsandbytes()
    folder = family_folder("sdxl")
    teacher = load_teacher(str(folder))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 2, 3.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: [PROMPTS[i] for i in indices], spec, tmp_path / "pairs")
    settings: dict[str, Any] = {
        "teacher": str(folder),
        "loss": "mse",
        "batch_size": 2,
        "adversarial_weight": 0.1,
        "discriminator_warmup": 0,
        "total_pairs": 8,
    }
    recipe = Recipe(optimizer="adamw8bit", **settings)

    # A run without interruption, and one that is stopped before its third step and resumed
    train.distill(recipe, tmp_path / "pairs", tmp_path / "whole")
    real_step = train.step
    num_steps = 0

    def stop_before_third_step(run: Any, *args: Any) -> Any:
        nonlocal num_steps
        if num_steps == 2:
            run.save(tmp_path / "resumed")
            raise SystemExit
        num_steps += 1
        return real_step(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "step", stop_before_third_step)
        with pytest.raises(SystemExit):
            train.distill(recipe, tmp_path / "pairs", tmp_path / "resumed")
    train.distill(recipe, tmp_path / "pairs", tmp_path / "resumed")

    # The same bits
    expected, expected_meta = checkpoint.load(tmp_path / "whole" / CHECKPOINT)
    found, found_meta = checkpoint.load(tmp_path / "resumed" / CHECKPOINT)
    assert found_meta == expected_meta
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    states = [value for key, value in expected.items() if key.endswith("/state1")]
    assert any(value.dtype == torch.uint8 for value in states)

    # A smaller checkpoint
    size_8bit = float(dry_run(recipe, tmp_path / "pairs")["checkpoint_disk_mib"])
    size = float(dry_run(Recipe(**settings), tmp_path / "pairs")["checkpoint_disk_mib"])
    assert size_8bit < size
