"""Reduced precision in the student: what the last layer's rounding would cost, and that ours pays none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion2gan.distill.student import Student
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.schedule import to_x0


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "factor"), [("sd15", 14.6), ("sdxl", 14.6), ("sd3", 1.0), ("sana", 1.0)]
)
def test_bfloat16_in_the_last_layer_is_amplified_and_ours_avoids_it(
    name: str, factor: float, family_folder: Callable[[str], Path]
) -> None:
    teacher = load_teacher(str(family_folder(name)), resolution=256 if name == "sana" else 64)
    student = Student(teacher)
    noise, cond = (
        noise_from_seeds([1, 2], teacher.latent_shape),
        teacher.encode(["a star", "two stars"]),
    )
    last = "conv_out" if hasattr(student.network, "conv_out") else "proj_out"
    seen: list[tuple[Tensor, Tensor]] = []
    getattr(student.network, last).register_forward_hook(
        lambda module, args, out: seen.append((args[0], out))
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = student(noise, cond)
        features, output = seen[0]
        plain = getattr(teacher.network, last)(features)  # the same weights, as autocast runs them
    exact = getattr(teacher.network, last)(features.float())
    assert plain.dtype == torch.bfloat16 and output.dtype == ours.dtype == torch.float32
    assert torch.equal(output, exact)
    level, x_t = teacher.level(teacher.last_timestep), torch.zeros_like(exact)
    x0, rounded = (to_x0(answer, x_t, level, teacher.prediction_type) for answer in (exact, plain))
    error = rms(plain.float() - exact)
    assert error / rms(exact) > 1e-3  # bfloat16 has eight bits
    assert rms(rounded - x0) / error == pytest.approx(factor, rel=0.01)
