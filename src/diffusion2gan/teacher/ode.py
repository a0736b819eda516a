"""The teacher's deterministic ODE: noise → latents."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.schedule import SOLVERS, Level, extrapolate_x0, ode_step


@torch.no_grad()
def solve_ode(
    teacher: Teacher,
    noise: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    num_inference_steps: int,
    guidance_scale: float,
    solver: str = "ddim",
) -> Tensor:
    """Integrates the teacher's probability-flow ODE from `noise` [B, C, h, w] to latents.

    Per step, with network output x0(x, c) converted to x0:

        x0  = x0(x, uncond) + s·(x0(x, cond) − x0(x, uncond))       classifier-free guidance
        x0' = x0                                                    ddim
            = x0 extrapolated from the previous step's x0           dpm++, `extrapolate_x0`
        x   = α'·x0' + σ'·(x − α·x0')/σ                             see `schedule.ode_step`

    `solver`: `ddim` is DDIM, or Euler for flow models, at the timesteps of the teacher's scheduler
    settings. `dpm++` is DPM-Solver++(2M) (Lu et al. 2022): Karras sigmas for diffusion models, the
    same σ as Euler's for flow models; it needs fewer steps for the same accuracy.

    Guidance (Ho & Salimans 2022, eq. 6) is applied to x0, which equals applying it to ε or v,
    because all are affine in each other at the same x_t. `guidance_scale` s ≤ 1 turns it off, as
    in diffusers. A guidance-distilled teacher (FLUX.1-dev) takes the scale as an input instead,
    and `uncond` is not used.

    Returns float32 latents [B, C, h, w], multiplied by the VAE's scaling factor. Raises UserError
    if the solver is unknown, or if guidance is requested from a teacher that has none
    (FLUX.1-schnell).
    """
    check_solver(solver)
    use_cfg = teacher.uses_classifier_free_guidance(guidance_scale)
    if teacher.guidance == "embedded":
        cond = cond.with_guidance(guidance_scale)

    x = noise
    previous: tuple[Tensor, Level] | None = None
    for timestep, current, target in teacher.steps(num_inference_steps, solver):
        # 1. The network's x0: [B, C, h, w]
        if use_cfg:
            both = teacher.denoise(
                torch.cat([x, x]), timestep, Conditioning.concat(uncond, cond), level=current
            )
            x0_uncond, x0_cond = both.chunk(2)
            x0 = x0_uncond + guidance_scale * (x0_cond - x0_uncond)
        else:
            x0 = teacher.denoise(x, timestep, cond, level=current)

        # 2. One step towards it, of second order if the solver is and there was a step before
        direction = x0
        if solver == "dpm++" and previous is not None:
            direction = extrapolate_x0(x0, *previous, current, target)
        x = ode_step(x, direction, current, target)
        previous = (x0, current)
    return x


def check_solver(name: str) -> None:
    """Raises UserError, naming the nearest, if there is no such solver."""
    if name not in SOLVERS:
        raise UserError(f"unknown solver {name!r}{nearest(name, SOLVERS)}")
