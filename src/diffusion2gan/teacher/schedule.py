"""Noise levels, network outputs and ODE steps as pure functions, in the papers' notation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")

SOLVERS = ("ddim", "dpm++")  # of the teacher's ODE; see `ode.solve_ode`
DEFAULT_SOLVER = "dpm++"

KARRAS_RHO = 7.0  # Karras et al. 2022, section 3
MIN_ALPHA_BAR = 2.0**-24  # as diffusers' solvers, where the terminal SNR is zero


def default_num_steps(solver: str, flow: bool, zero_snr: bool = False) -> int:
    """The number of steps at which a solver is about as accurate as ddim with 50, or more so.

    Measured by benchmarks/ode_error.py on the pocket teacher: dpm++ has a fourth of ddim's squared
    error with 20 steps, and 0.8 of it with 30 at the levels of a flow model, whose own σ suit
    Euler. With zero terminal SNR the Karras sigmas begin at σ/α = 4096 and most steps are spent at
    nearly pure noise: on N(0, 1), whose ODE is known, 40 steps have 0.8 of the error of 50 with
    ddim, and 35 have 1.3 of it (`--gaussian`).
    """
    if solver == "ddim":
        return 50
    if flow:
        return 30
    return 40 if zero_snr else 20


class Level(NamedTuple):
    """A noise level: x_t = α·x0 + σ·ε. `alpha` and `sigma` are numbers or tensors [B, 1, 1, 1]."""

    alpha: Tensor | float
    sigma: Tensor | float

    @classmethod
    def diffusion(cls, alpha_bar: Tensor | float) -> Level:
        """Variance-preserving: α = √ᾱ and σ = √(1−ᾱ) (Ho et al. 2020, eq. 4)."""
        return cls(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    @classmethod
    def flow(cls, sigma: Tensor | float) -> Level:
        """The straight path from data to noise: α = 1−σ.

        Liu et al. 2023; Esser et al. 2024, eq. 13.
        """
        return cls(1 - sigma, sigma)


class Step(NamedTuple):
    """One step of the ODE: the network's timestep, and the noise levels before and after it."""

    timestep: float
    current: Level
    target: Level


def to_x0(output: Tensor, x_t: Tensor, level: Level, prediction_type: str) -> Tensor:
    """Converts a network's output at a noise level to x0. All are [B, C, h, w]; float32 result.

    - epsilon: x0 = (x_t − σ·ε) / α (Ho et al. 2020, eq. 15). At Stable Diffusion's last timestep
      α² = 0.0047, so an error in ε is amplified 14.6 times; this is why the conversion never
      runs in reduced precision.
    - v_prediction: x0 = α·x_t − σ·v (Salimans & Ho 2022, appendix D).
    - sample: the output itself.
    - flow_prediction: v = ε − x0, so x0 = x_t − σ·v (Esser et al. 2024, eq. 8).
    """
    output = output.float()
    x_t = x_t.float()
    alpha, sigma = level

    match prediction_type:
        case "epsilon":
            return (x_t - sigma * output) / alpha
        case "v_prediction":
            return alpha * x_t - sigma * output
        case "sample":
            return output
        case "flow_prediction":
            return x_t - sigma * output
    raise ValueError(
        f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTIONS)}"
    )


def ode_step(x_t: Tensor, x0: Tensor, current: Level, target: Level) -> Tensor:
    """One deterministic step from noise level `current` to `target`, with x0 and ε held fixed.

        ε    = (x_t − α·x0) / σ
        x_t' = α'·x0 + σ'·ε

    Between diffusion levels this is DDIM (Song et al. 2021, eq. 12 with σ = 0). Between flow
    levels it is Euler's step x_t + (σ' − σ)·v, because v = ε − x0.
    """
    eps = (x_t - current.alpha * x0) / current.sigma
    return target.alpha * x0 + target.sigma * eps


def extrapolate_x0(
    x0: Tensor, previous_x0: Tensor, previous: Level, current: Level, target: Level
) -> Tensor:
    """The x0 of a second-order step: DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    With λ = log(α/σ), the x0 of the network is extrapolated linearly from the levels `previous`
    and `current` to the middle of the step from `current` to `target`:

        x0' = x0 + (x0 − x0_previous)·(λ_target − λ_current) / (2·(λ_current − λ_previous))

    `ode_step` with x0' is the solver's update: its exp(−h) is (α·σ')/(σ·α'). The levels are
    numbers. A step from pure noise (α = 0, λ = −∞) has no finite distance to `current`, and a
    step to clean latents (σ' = 0, λ = ∞) no middle: there the step is of first order, x0' = x0.
    """
    if previous.alpha == 0 or target.sigma == 0:
        return x0
    width = _log_snr(target) - _log_snr(current)
    previous_width = _log_snr(current) - _log_snr(previous)
    return x0 + (x0 - previous_x0) * (width / (2 * previous_width))


def _log_snr(level: Level) -> float:
    """λ = log(α/σ), half the logarithm of the signal-to-noise ratio."""
    return math.log(float(level.alpha)) - math.log(float(level.sigma))


def karras_sigmas(sigma_max: float, sigma_min: float, num_steps: int) -> NDArray[np.float64]:
    """[num_steps]: noise-to-signal ratios σ/α of Karras et al. 2022, eq. 5, in falling order."""
    ramp = np.linspace(0, 1, num_steps)
    start = sigma_max ** (1 / KARRAS_RHO)
    end = sigma_min ** (1 / KARRAS_RHO)
    return np.asarray((start + ramp * (end - start)) ** KARRAS_RHO, np.float64)


def karras_steps(alpha_bars: NDArray[np.float64], num_steps: int) -> list[Step]:
    """The steps of a diffusion model with Karras sigmas, from the last timestep to clean latents.

    `alpha_bars` [T] is the training schedule. The sigmas go from its last level to its first, and
    then to zero. The network's timestep of a level is interpolated in log(σ/α) and rounded, as in
    diffusers' DPMSolverMultistepScheduler with `use_karras_sigmas`.
    """
    alpha_bars = np.where(alpha_bars == 0, MIN_ALPHA_BAR, alpha_bars)
    sigmas = ((1 - alpha_bars) / alpha_bars) ** 0.5
    chosen = karras_sigmas(float(sigmas[-1]), float(sigmas[0]), num_steps)
    timesteps = np.interp(np.log(chosen), np.log(sigmas), np.arange(len(sigmas))).round()

    levels = [Level.diffusion(float(1 / (1 + sigma**2))) for sigma in chosen]
    levels.append(Level(1.0, 0.0))
    steps = []
    for i, timestep in enumerate(timesteps):
        steps.append(Step(int(timestep), levels[i], levels[i + 1]))
    return steps
