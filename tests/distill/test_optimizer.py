"""Adam in 8 bits: it learns as Adam does, takes a quarter of the memory, and its run resumes exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion2gan.cost.distill import adam_bytes, dry_run
from diffusion2gan.distill import train
from diffusion2gan.distill.optimizer import discriminator_optimizer, student_optimizer
from diffusion2gan.distill.run import CHECKPOINT
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.teacher.loading import load_teacher

PROMPTS = ["a star", "two stars", "a red ring", "a star"]


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"pip install 'diffusion2gan\[adam8bit\]', or set optimizer=adamw"
    ):
        student_optimizer(Recipe(optimizer="adamw8bit"), nn.Linear(2, 2))


def test_the_default_is_torchs_own() -> None:
    assert type(student_optimizer(Recipe(), nn.Linear(2, 2))) is torch.optim.AdamW
    assert type(discriminator_optimizer(Recipe(), nn.Linear(2, 2))) is torch.optim.Adam


@pytest.mark.parametrize("make", [student_optimizer, discriminator_optimizer])
def test_its_steps_are_nearly_adams(make: Callable[[Recipe, nn.Module], Any]) -> None:
    pytest.importorskip(
        "bitsandbytes", reason="needs the extra [adam8bit]; it slows every start of diffusers"
    )
    weights, states, losses = {}, {}, {}
    data = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(1)
        net = nn.Linear(96, 96)
        recipe = Recipe(optimizer=name, learning_rate=1e-3, discriminator_learning_rate=1e-3)
        optimizer = make(recipe, net)
        start = net.weight.detach().clone()
        for _ in range(30):
            optimizer.zero_grad()
            loss = (net(data) - data.flip(1)).square().mean()
            losses.setdefault("start", float(loss.detach()))
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
        weights[name] = net.weight.detach() - start
        tensors = checkpoint.pack_optimizer("adam", optimizer)
        states[name] = sum(
            t.numel() * t.element_size()
            for k, t in tensors.items()
            if "qmap" not in k and "step" not in k
        )
        assert states[name] == adam_bytes(recipe, net)  # what a dry run counts
    assert not torch.equal(weights["adamw8bit"], weights["adamw"])
    assert (
        float(
            torch.cosine_similarity(weights["adamw8bit"].flatten(), weights["adamw"].flatten(), 0)
        )
        > 0.99
    )
    assert losses["adamw"] < 0.95 * losses["start"]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.01)
    assert states["adamw8bit"] < 0.28 * states["adamw"]


def test_a_run_stops_and_resumes_exactly(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "bitsandbytes", reason="needs the extra [adam8bit]; it slows every start of diffusers"
    )
    folder = family_folder("sdxl")
    teacher = load_teacher(str(folder))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 2, 3.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: [PROMPTS[i] for i in indices], spec, tmp_path / "pairs")
    settings: dict[str, Any] = {
        "teacher": str(folder),
        "loss": "mse",
        "batch_size": 2,
        "adversarial_weight": 0.1,
    }
    recipe = Recipe(optimizer="adamw8bit", total_pairs=8, discriminator_warmup=0, **settings)
    train.distill(recipe, tmp_path / "pairs", tmp_path / "whole")
    real, steps = train.step, iter(range(100))

    def cut(*args: Any) -> Any:
        if next(steps) == 2:
            args[0].save(tmp_path / "cut")
            raise SystemExit
        return real(*args)

    monkeypatch.setattr(train, "step", cut)
    with pytest.raises(SystemExit):
        train.distill(recipe, tmp_path / "pairs", tmp_path / "cut")
    monkeypatch.setattr(train, "step", real)
    train.distill(recipe, tmp_path / "pairs", tmp_path / "cut")
    whole, resumed = (checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "cut"))
    assert whole[1] == resumed[1] and whole[0].keys() == resumed[0].keys()
    assert all(torch.equal(value, resumed[0][key]) for key, value in whole[0].items())
    assert any(
        value.dtype == torch.uint8 for key, value in whole[0].items() if key.endswith("/state1")
    )
    told = dry_run(recipe, tmp_path / "pairs")
    assert float(told["checkpoint_disk_mib"]) < float(
        dry_run(Recipe(total_pairs=8, **settings), tmp_path / "pairs")["checkpoint_disk_mib"]
    )
