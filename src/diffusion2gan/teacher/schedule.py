"""Noise levels, network outputs and ODE steps as pure functions, in the papers' notation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


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
