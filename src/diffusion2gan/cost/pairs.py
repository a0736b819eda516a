"""What making a set would take, before it starts."""

from __future__ import annotations

import math
import time

from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.teacher.ode import solve_ode
from diffusion2gan.teacher.pipeline import Teacher

MIB = 2**20
BYTES_PER_PROMPT = 60  # a caption's text, compressed, its index and seed
STEPS_MEASURED = 2


def cost_of(
    teacher: Teacher, spec: PairsSpec, prompts: list[str], price_per_gpu_hour: float | None = None
) -> dict[str, float | int]:
    """Parameters, memory of the weights, disk, and hours: measured on two ODE steps of one batch, after one unmeasured.

    `prompts` are as many as the batch; money is hours · `price_per_gpu_hour`.
    """
    noise = noise_from_seeds(range(len(prompts)), spec.latent_shape).to(teacher.device)
    uncond = teacher.unconditional().expand(len(prompts))
    solve_ode(teacher, noise, teacher.encode(prompts), uncond, 1, spec.guidance_scale)
    start = time.monotonic()
    cond = teacher.encode(prompts)
    encoded_s = time.monotonic() - start
    solve_ode(teacher, noise, cond, uncond, STEPS_MEASURED, spec.guidance_scale).cpu()
    ode_s = time.monotonic() - start - encoded_s
    batch_s = encoded_s + ode_s / STEPS_MEASURED * spec.num_inference_steps
    hours = spec.count / len(prompts) * batch_s / 3600
    latents = math.prod(spec.latent_shape) * 2 * (2 if spec.keep_noise else 1)
    parts = [part for part in teacher.pipeline.components.values() if hasattr(part, "parameters")]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    cost: dict[str, float | int] = {
        "network_parameters": sum(p.numel() for p in teacher.network.parameters()),
        "weights_mib": round(weights / MIB, 1),
        "disk_mib": round(spec.count * (latents + BYTES_PER_PROMPT) / MIB, 1),
        "pairs_per_second": round(len(prompts) / batch_s, 3),
        "hours": round(hours, 2),
    }
    if price_per_gpu_hour is not None:
        cost["money"] = round(hours * price_per_gpu_hour, 2)
    return cost
