"""A wrong prediction type is detected from x0 of pure noise; a right one gives no warning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion2gan import assets
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec, read_shard
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.sanity_check import count_implausible, warn_if_implausible

PROMPTS = ["a large striped red ring", "a small blue star on pink"]


class EpsilonNetwork(nn.Module):
    """The pocket teacher's network, trained to predict v, converted to ε = σ·x_t + α·v."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network = teacher.network
        self.config = teacher.network.config
        self.level = teacher.level

    def forward(self, x: Tensor, timestep: float, *args: Any, **kwargs: Any) -> Any:
        alpha, sigma = self.level(timestep)
        v = self.network(x, timestep, *args, **kwargs).sample
        return SimpleNamespace(sample=sigma * x + alpha * v)


@pytest.mark.parametrize("predicts", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("read_as", ["v_prediction", "epsilon"])
def test_warns_exactly_if_the_prediction_type_is_wrong(
    predicts: str, read_as: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load_teacher()
    assert teacher.prediction_type == "v_prediction"
    if predicts == "epsilon":
        teacher.network = EpsilonNetwork(teacher)
    teacher.prediction_type = read_as

    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    warned = warn_if_implausible(teacher, noise, teacher.encode(PROMPTS))
    assert warned == (predicts != read_as)
    assert (f"read as {read_as}" in capsys.readouterr().err) == warned


def test_making_pairs_warns_once_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load_teacher()
    teacher.prediction_type = "epsilon"
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 1, 1.0, teacher.latent_shape, 2)

    def prompts(indices: Sequence[int]) -> list[str]:
        return ["a star"] * len(indices)

    make_pairs(teacher, prompts, spec, tmp_path / "pairs")
    assert capsys.readouterr().err.count("looks wrong") == 1

    # All pairs exist already
    make_pairs(teacher, prompts, spec, tmp_path / "pairs")
    assert "looks wrong" not in capsys.readouterr().err


def test_implausible_latents_are_counted_per_pair() -> None:
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert count_implausible(latents) == 0
    latents[0] *= 10
    latents[2, 0, 0, 0] = float("inf")
    latents[3, 1, 2, 3] = float("nan")
    assert count_implausible(latents) == 3

    # None of the pocket teacher's
    assert count_implausible(read_shard(assets.folder("pairs"), 0).latents) == 0
