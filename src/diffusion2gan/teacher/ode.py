"""The teacher's deterministic ODE: noise → latents."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.schedule import ode_step


@torch.no_grad()
def solve_ode(
    teacher: Teacher,
    noise: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Latents [B, C, h, w] (float32, × scaling_factor) that DDIM, or Euler for flows, reaches from `noise`.

    Timesteps are those of the teacher's own scheduler settings, `num_inference_steps` of them. Classifier-free
    guidance (Ho & Salimans 2022, eq. 6) is taken between x0s, which is the same as between ε or v because all are
    affine in each other at one x_t; `guidance_scale` ≤ 1 turns it off, as in diffusers. A guidance-distilled teacher
    (FLUX.1-dev) reads the scale instead, and `uncond` is not used. Raises UserError where the teacher knows no guidance
    at all and one is asked for.
    """
    guided = teacher.is_guided(guidance_scale)
    cond = cond.with_guidance(guidance_scale) if teacher.guidance == "read" else cond
    x = noise
    for timestep, here, there in teacher.steps(num_inference_steps):
        if guided:
            both = teacher.denoise(torch.cat([x, x]), timestep, Conditioning.concat(uncond, cond))
            without, with_prompt = both.chunk(2)
            x0 = without + guidance_scale * (with_prompt - without)
        else:
            x0 = teacher.denoise(x, timestep, cond)
        x = ode_step(x, x0, here, there)
    return x
