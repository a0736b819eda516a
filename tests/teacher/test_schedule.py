"""Conversions and ODE steps against the forward process and closed forms in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion2gan.pocket import models
from diffusion2gan.teacher.schedule import (
    PREDICTIONS,
    Level,
    Step,
    extrapolate_x0,
    karras_steps,
    ode_step,
    to_x0,
)

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


# DPM-Solver++(2M)

DATA_STD = 0.7


def gaussian_error(steps: list[Step], second_order: bool) -> float:
    """Error of a solver where the ODE's solution is known: Gaussian data with a perfect network.

    x0 = α·s²·x / (α²s² + σ²), and x changes in proportion to √(α²s² + σ²).
    """

    def std(level: Level) -> float:
        return math.sqrt((float(level.alpha) * DATA_STD) ** 2 + float(level.sigma) ** 2)

    start = random(3, 4, 2, 2)
    x = start
    previous = None
    for _, current, target in steps:
        x0 = current.alpha * DATA_STD**2 / std(current) ** 2 * x
        direction = x0
        if second_order and previous is not None:
            direction = extrapolate_x0(x0, *previous, current, target)
        x = ode_step(x, direction, current, target)
        previous = (x0, current)

    exact = start * std(steps[-1].target) / std(steps[0].current)
    return float((x - exact).abs().max() / exact.abs().max())


def flow_steps(num_steps: int) -> list[Step]:
    """From pure noise (σ = 1, α = 0) to clean latents (σ = 0), with a shift of 3."""
    sigmas = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, num_steps + 1).tolist()]
    levels = [Level.flow(sigma) for sigma in sigmas]
    return [Step(1000 * s, a, b) for s, a, b in zip(sigmas, levels, levels[1:], strict=False)]


@pytest.mark.parametrize("schedule", ["karras", "zero_terminal_snr", "flow"])
def test_dpm_solver_converges_faster_than_first_order_steps(schedule: str) -> None:
    alpha_bars = ALPHA_BARS.numpy().copy()
    if schedule == "zero_terminal_snr":
        alpha_bars[-1] = 0

    def steps(num_steps: int) -> list[Step]:
        if schedule == "flow":
            return flow_steps(num_steps)
        # Not the last, from σ/α = 0.029 to 0, which does not shrink with their number
        return karras_steps(alpha_bars, num_steps)[:-1]

    first = [gaussian_error(steps(n), second_order=False) for n in (80, 320)]
    second = [gaussian_error(steps(n), second_order=True) for n in (80, 320)]
    assert second[0] < first[0] / 3
    # Four times the steps: a quarter of the error at first order, a sixteenth at second
    # (a little more where λ is infinite at the ends of a flow)
    assert 3 < first[0] / first[1] < 5
    assert second[0] / second[1] > 8


def test_dpm_step_is_the_published_update() -> None:
    """Lu et al. 2022, algorithm 2, in λ, h and r, in float64."""
    previous, current, target = (Level.diffusion(a) for a in (0.1, 0.3, 0.6))
    x, x0, previous_x0 = (random(2, 3, seed=seed) for seed in range(3))
    lam = [math.log(level.alpha / level.sigma) for level in (previous, current, target)]
    h = lam[2] - lam[1]
    r = (lam[1] - lam[0]) / h
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous_x0
    expected = target.sigma / current.sigma * x - target.alpha * math.expm1(-h) * d

    direction = extrapolate_x0(x0, previous_x0, previous, current, target)
    found = ode_step(x, direction, current, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_dpm_step_is_first_order_after_pure_noise_and_into_clean_latents() -> None:
    x0, previous_x0 = random(2, 3), random(2, 3, seed=1)
    noise, middle, clean = Level(0.0, 1.0), Level.flow(0.5), Level(1.0, 0.0)
    later = Level.flow(0.25)
    assert torch.equal(extrapolate_x0(x0, previous_x0, noise, middle, later), x0)
    assert torch.equal(extrapolate_x0(x0, previous_x0, middle, later, clean), x0)
    assert not torch.equal(extrapolate_x0(x0, previous_x0, Level.flow(0.9), middle, later), x0)


def test_karras_steps_go_from_the_last_timestep_to_clean_latents() -> None:
    steps = karras_steps(ALPHA_BARS.numpy(), 20)
    assert len(steps) == 20
    assert steps[0].timestep == 999 and steps[-1].timestep == 0
    assert steps[0].current.alpha ** 2 == pytest.approx(SD_LAST)
    assert steps[-1].target == (1.0, 0.0)
    for step, following in pairwise(steps):
        assert step.target == following.current and step.timestep > following.timestep

    # One step is the student's: from pure noise at the last timestep to x0
    (only,) = karras_steps(ALPHA_BARS.numpy(), 1)
    assert only.timestep == 999 and only.target == (1.0, 0.0)
