"""The noise schedule's algebra: noise levels, and what a network's output means. Pure functions, float32."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Level(NamedTuple):
    """A noise level: x_t = alpha·x0 + sigma·ε; numbers, or tensors [B, 1, 1, 1]."""

    alpha: Tensor | float
    sigma: Tensor | float

    @classmethod
    def diffusion(cls, alpha_bar: Tensor | float) -> Level:
        """Variance-preserving: √ᾱ and √(1−ᾱ) (Ho et al. 2020, eq. 4)."""
        return cls(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)

    @classmethod
    def flow(cls, sigma: Tensor | float) -> Level:
        """The straight path from data to noise: 1−σ and σ (Liu et al. 2023; Esser et al. 2024, eq. 13)."""
        return cls(1 - sigma, sigma)


class Step(NamedTuple):
    """One step of the ODE: the timestep that the network is told, the levels before and after."""

    timestep: float
    here: Level
    there: Level


def to_x0(output: Tensor, x_t: Tensor, level: Level, prediction_type: str) -> Tensor:
    """x0 from a network's output at a noise level; all [B, C, h, w], in float32.

    epsilon: x0 = (x_t − σ·ε) / α (Ho et al. 2020, eq. 15): at Stable Diffusion's last timestep α² = 0.0047 and an
    error in ε grows 14.6 times, which is why this never runs in reduced precision.
    v_prediction: x0 = α·x_t − σ·v (Salimans & Ho 2022, appendix D). sample: the output itself.
    flow_prediction: v = ε − x0, so x0 = x_t − σ·v (Esser et al. 2024, eq. 8).
    """
    output, x_t = output.float(), x_t.float()
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


def ode_step(x_t: Tensor, x0: Tensor, here: Level, there: Level) -> Tensor:
    """One deterministic step: keep x0 and ε, move to another level.

    Between diffusion levels this is DDIM (Song et al. 2021, eq. 12 with σ = 0), between flow levels Euler's step
    x + (σ' − σ)·v, because v = ε − x0 there.
    """
    eps = (x_t - here.alpha * x0) / here.sigma
    return there.alpha * x0 + there.sigma * eps
