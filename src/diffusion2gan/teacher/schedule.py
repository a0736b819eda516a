"""The noise schedule's algebra: alpha_bar, and what a network's output means. Pure functions, float32."""

from __future__ import annotations

from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def to_x0(output: Tensor, x_t: Tensor, alpha_bar: Tensor | float, prediction_type: str) -> Tensor:
    """x0 from a network's output at noise level `alpha_bar` (scalar or [B, 1, 1, 1]); all [B, C, h, w], in float32.

    epsilon: x0 = (x_t − √(1−ᾱ)·ε) / √ᾱ (Ho et al. 2020, eq. 15): at Stable Diffusion's last timestep ᾱ = 0.0047 and
    an error in ε grows 14.6 times, which is why this never runs in reduced precision.
    v_prediction: x0 = √ᾱ·x_t − √(1−ᾱ)·v (Salimans & Ho 2022, appendix D). sample: the output itself.
    """
    output, x_t = output.float(), x_t.float()
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    if prediction_type == "sample":
        return output
    raise ValueError(f"unknown prediction_type {prediction_type!r}; known: {', '.join(PREDICTIONS)}")


def ddim_step(x_t: Tensor, x0: Tensor, alpha_bar: float, alpha_bar_next: float) -> Tensor:
    """One deterministic step (Song et al. 2021, eq. 12 with σ = 0): keep ε, move to `alpha_bar_next`."""
    eps = (x_t - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
    return alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * eps
