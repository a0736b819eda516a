"""ε and v mixed up are told from the teacher's first x0; a sound teacher is left in peace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.sanity_check import warn_if_implausible

PROMPTS = ["a large striped red ring", "a small blue star on pink"]


class SaysEpsilon(nn.Module):
    """The pocket's network, trained to predict v, made to answer the ε that it means: ε = σ·x_t + α·v."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network, self.config, self._teacher = (
            teacher.network,
            teacher.network.config,
            (teacher,),
        )

    def forward(self, x: Tensor, timestep: float, *args: Any, **kwargs: Any) -> Any:
        alpha, sigma = self._teacher[0].level(timestep)
        return SimpleNamespace(
            sample=sigma * x + alpha * self.network(x, timestep, *args, **kwargs).sample
        )


@pytest.mark.parametrize("says", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("read_as", ["v_prediction", "epsilon"])
def test_a_mix_up_is_told(says: str, read_as: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = load_teacher()
    assert teacher.prediction_type == "v_prediction"
    teacher.network = SaysEpsilon(teacher) if says == "epsilon" else teacher.network
    teacher.prediction_type = read_as
    told = warn_if_implausible(
        teacher, noise_from_seeds([1, 2], teacher.latent_shape), teacher.encode(PROMPTS)
    )
    assert told == (says != read_as)
    assert (f"read as {read_as}" in capsys.readouterr().err) == told


def test_pairs_says_it_once_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = load_teacher()
    teacher.prediction_type = "epsilon"
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 1, 1.0, teacher.latent_shape, 2)
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, tmp_path / "pairs")
    assert capsys.readouterr().err.count("looks wrong") == 1
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, tmp_path / "pairs")
    assert "looks wrong" not in capsys.readouterr().err  # nothing was made
