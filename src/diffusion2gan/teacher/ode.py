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
    """Integrates the teacher's probability-flow ODE from `noise` [B, C, h, w] to latents.

    The solver is DDIM, or Euler for flow models, at `num_inference_steps` timesteps of the
    teacher's scheduler settings. Per step, with network output x0(x, c) converted to x0:

        x0 = x0(x, uncond) + s·(x0(x, cond) − x0(x, uncond))        classifier-free guidance
        x  = α'·x0 + σ'·(x − α·x0)/σ                                see `schedule.ode_step`

    Guidance (Ho & Salimans 2022, eq. 6) is applied to x0, which equals applying it to ε or v,
    because all are affine in each other at the same x_t. `guidance_scale` s ≤ 1 turns it off, as
    in diffusers. A guidance-distilled teacher (FLUX.1-dev) takes the scale as an input instead,
    and `uncond` is not used.

    Returns float32 latents [B, C, h, w], multiplied by the VAE's scaling factor. Raises UserError
    if guidance is requested from a teacher that has none (FLUX.1-schnell).
    """
    use_cfg = teacher.uses_classifier_free_guidance(guidance_scale)
    if teacher.guidance == "embedded":
        cond = cond.with_guidance(guidance_scale)

    x = noise
    for timestep, current, target in teacher.steps(num_inference_steps):
        # 1. The network's x0: [B, C, h, w]
        if use_cfg:
            both = teacher.denoise(torch.cat([x, x]), timestep, Conditioning.concat(uncond, cond))
            x0_uncond, x0_cond = both.chunk(2)
            x0 = x0_uncond + guidance_scale * (x0_cond - x0_uncond)
        else:
            x0 = teacher.denoise(x, timestep, cond)

        # 2. One step towards it
        x = ode_step(x, x0, current, target)
    return x
