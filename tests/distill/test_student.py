"""Reduced precision in the student: the error of a bfloat16 output layer, which it avoids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
def test_output_layer_avoids_the_amplified_error_of_bfloat16(
    name: str, factor: float, family_folder: Callable[[str], Path]
) -> None:
    resolution = 256 if name == "sana" else 64
    teacher = load_teacher(str(family_folder(name)), resolution=resolution)
    student = Student(teacher)
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    cond = teacher.encode(["a star", "two stars"])

    # Input and output of the student's output layer under autocast
    layer_name = "conv_out" if hasattr(student.network, "conv_out") else "proj_out"
    calls: list[tuple[Tensor, Tensor]] = []
    student_layer = getattr(student.network, layer_name)
    student_layer.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        latents = student(noise, cond)
    features, output = calls[0]

    # The same layer in bfloat16, as autocast would run it, and in float32
    teacher_layer = getattr(teacher.network, layer_name)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher_layer(features)
    exact = teacher_layer(features.float())
    assert rounded.dtype == torch.bfloat16
    assert output.dtype == latents.dtype == torch.float32
    assert torch.equal(output, exact)

    # The rounding error would be multiplied by `factor` in x0
    level = teacher.level(teacher.last_timestep)
    x_t = torch.zeros_like(exact)
    x0 = to_x0(exact, x_t, level, teacher.prediction_type)
    rounded_x0 = to_x0(rounded, x_t, level, teacher.prediction_type)
    error = rms(rounded.float() - exact)
    assert error / rms(exact) > 1e-3  # bfloat16 has 8 significant bits
    assert rms(rounded_x0 - x0) / error == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_output_layer_runs_without_tf32_and_other_layers_keep_the_users_setting(
    name: str, family_folder: Callable[[str], Path]
) -> None:
    teacher = load_teacher(str(family_folder(name)), resolution=64)
    student = Student(teacher)
    layer_name = "conv_out" if hasattr(student.network, "conv_out") else "proj_out"

    # The settings when each layer computes
    settings: dict[str, tuple[bool, str]] = {}

    def record(layer: str) -> Callable[..., Tensor]:
        module = student.network.get_submodule(layer)
        compute = module._conv_forward if isinstance(module, nn.Conv2d) else F.linear

        def compute_and_record(*args: Tensor) -> Tensor:
            matmul_precision = torch.get_float32_matmul_precision()
            settings[layer] = (torch.backends.cudnn.allow_tf32, matmul_precision)
            return compute(*args)

        return compute_and_record

    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            if name == "sd15":
                for layer in ("conv_in", layer_name):
                    module = student.network.get_submodule(layer)
                    monkeypatch.setattr(module, "_conv_forward", record(layer))
            else:
                monkeypatch.setattr(F, "linear", record(layer_name))
            student(noise_from_seeds([1], teacher.latent_shape), teacher.encode(["a star"]))
    finally:
        torch.set_float32_matmul_precision(previous)

    # The last linear layer of a transformer is its output layer
    assert settings[layer_name] == (False, "highest")
    if name == "sd15":
        assert settings["conv_in"] == (True, "high")
    assert torch.backends.cudnn.allow_tf32
