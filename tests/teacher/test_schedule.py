"""Conversions and ODE steps against the forward process and closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffusion2gan.pocket import models
from diffusion2gan.teacher.schedule import PREDICTIONS, Level, ode_step, to_x0

ALPHA_BARS = models.scheduler().alphas_cumprod.double()
SD_LAST = float(ALPHA_BARS[-1])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perfect_output(
    x0: Tensor, eps: Tensor, alpha_bar: Tensor | float, prediction_type: str
) -> Tensor:
    """The output of a perfect network, in float64."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    return {"epsilon": eps, "v_prediction": v, "sample": x0}[prediction_type]


DIFFUSION = PREDICTIONS[:3]
LAST = Level.diffusion(SD_LAST)


@pytest.mark.parametrize("prediction_type", DIFFUSION)
@pytest.mark.parametrize("timestep", [0, 1, 400, 999])
def test_to_x0_undoes_the_forward_noising(prediction_type: str, timestep: int) -> None:
    alpha_bar = float(ALPHA_BARS[timestep])
    x0, eps = random(2, 4, 5, 3), random(2, 4, 5, 3, seed=1)
    x_t = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
    output = perfect_output(x0, eps, alpha_bar, prediction_type)

    found = to_x0(output, x_t, Level.diffusion(alpha_bar), prediction_type)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x0, rtol=0, atol=3e-5 if timestep == 999 else 2e-6)


@pytest.mark.parametrize("prediction_type", DIFFUSION)
def test_to_x0_takes_a_noise_level_per_sample(prediction_type: str) -> None:
    alpha_bar = ALPHA_BARS[[3, 500, 950]].reshape(3, 1, 1, 1)
    x0, eps = random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    output = perfect_output(x0, eps, alpha_bar, prediction_type)

    found = to_x0(output, x_t, Level.diffusion(alpha_bar.float()), prediction_type)
    torch.testing.assert_close(found.double(), x0, rtol=0, atol=1e-5)


def test_error_in_epsilon_is_amplified_14_6_times_at_stable_diffusions_last_timestep() -> None:
    assert pytest.approx(0.0047, abs=5e-5) == SD_LAST
    x_t, error = random(1, 4, 8, 8), random(1, 4, 8, 8, seed=2) * 1e-2

    def amplification(prediction_type: str) -> float:
        exact = to_x0(torch.zeros_like(x_t), x_t, LAST, prediction_type)
        found = to_x0(error, x_t, LAST, prediction_type)
        return float((found - exact).norm() / error.norm())

    assert amplification("epsilon") == pytest.approx(14.6, abs=0.02)
    assert amplification("v_prediction") == pytest.approx(1, abs=0.01)


def test_half_precision_outputs_are_converted_to_float32_first() -> None:
    x_t, output = random(1, 4, 4, 4).bfloat16(), random(1, 4, 4, 4, seed=1).bfloat16()
    found = to_x0(output, x_t, LAST, "epsilon")
    exact = (x_t.double() - math.sqrt(1 - SD_LAST) * output.double()) / math.sqrt(SD_LAST)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'flow'.*epsilon, v_prediction, sample"):
        to_x0(torch.zeros(1), torch.zeros(1), Level.diffusion(0.5), "flow")


def test_ddim_step_keeps_x0_and_epsilon() -> None:
    x0, eps = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    for current, target in [(0.1, 0.4), (SD_LAST, 0.5), (0.9, 1.0), (0.3, 0.3)]:  # ᾱ
        x_t = math.sqrt(current) * x0 + math.sqrt(1 - current) * eps
        expected = math.sqrt(target) * x0 + math.sqrt(1 - target) * eps
        found = ode_step(x_t, x0, Level.diffusion(current), Level.diffusion(target))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.001, 0.3, 1.0])
def test_flow_velocity_is_noise_minus_data(sigma: float) -> None:
    x0, eps = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    found = to_x0(eps - x0, (1 - sigma) * x0 + sigma * eps, Level.flow(sigma), "flow_prediction")
    torch.testing.assert_close(found.double(), x0, rtol=0, atol=1e-6)


def test_step_between_flow_levels_is_eulers() -> None:
    """x + (σ' − σ)·v in float64, computed from the velocity."""
    x_t, velocity = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    for current, target in [(1.0, 0.97), (0.6, 0.2), (0.01, 0.0)]:  # σ
        x0 = x_t - current * velocity
        found = ode_step(x_t, x0, Level.flow(current), Level.flow(target))
        torch.testing.assert_close(found, x_t + (target - current) * velocity, rtol=0, atol=1e-12)
