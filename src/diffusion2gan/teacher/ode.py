"""The teacher's deterministic ODE: noise → latents."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion2gan.teacher.pipeline import Conditioning, Teacher
from diffusion2gan.teacher.schedule import ddim_step


@torch.no_grad()
def solve_ode(
    teacher: Teacher, noise: Tensor, cond: Conditioning, uncond: Conditioning, num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:  # fmt: skip
    """Latents [B, C, h, w] (float32, × scaling_factor) that DDIM reaches from `noise` in `num_inference_steps`.

    Timesteps are those of the teacher's own scheduler settings. Classifier-free guidance (Ho & Salimans 2022,
    eq. 6) is taken between x0s, which is the same as between ε or v because all are affine in each other at one x_t;
    `guidance_scale` ≤ 1 turns it off, as in diffusers.
    """
    x = noise
    for timestep, alpha_bar, alpha_bar_next in teacher.ddim_steps(num_inference_steps):
        if guidance_scale > 1:
            both = teacher.denoise(torch.cat([x, x]), timestep, Conditioning.concat(uncond, cond))
            without, with_prompt = both.chunk(2)
            x0 = without + guidance_scale * (with_prompt - without)
        else:
            x0 = teacher.denoise(x, timestep, cond)
        x = ddim_step(x, x0, alpha_bar, alpha_bar_next)
    return x
