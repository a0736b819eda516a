"""The cost of making a set of pairs, estimated before it starts."""

from __future__ import annotations

import math
import time

from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.pipelines.timing import synchronize
from diffusion2gan.teacher.ode import solve_ode
from diffusion2gan.teacher.pipeline import Teacher

MIB = 2**20
BYTES_PER_PROMPT = 60  # a compressed caption, its index and seed
NUM_MEASURED_STEPS = 2


def estimate_pairs_cost(
    teacher: Teacher, spec: PairsSpec, prompts: list[str], price_per_gpu_hour: float | None = None
) -> dict[str, float | int]:
    """Parameters, memory of the weights, disk, hours and, given a price, money.

    The hours are measured: `NUM_MEASURED_STEPS` ODE steps of one batch, after a warm-up step.
    `prompts` are those of the batch.
    """
    batch_size = len(prompts)
    noise = noise_from_seeds(range(batch_size), spec.latent_shape).to(teacher.device)
    uncond = teacher.unconditional(spec.negative_prompt).expand(batch_size)

    # Warm-up
    solve_ode(teacher, noise, teacher.encode(prompts), uncond, 1, spec.guidance_scale, spec.solver)

    # Measure encoding and ODE steps
    synchronize(teacher.device)
    start = time.monotonic()
    cond = teacher.encode(prompts)
    synchronize(teacher.device)
    encoded = time.monotonic()
    solve_ode(teacher, noise, cond, uncond, NUM_MEASURED_STEPS, spec.guidance_scale, spec.solver)
    synchronize(teacher.device)
    solved = time.monotonic()
    step_s = (solved - encoded) / NUM_MEASURED_STEPS
    batch_s = encoded - start + step_s * spec.num_inference_steps
    hours = spec.count / batch_size * batch_s / 3600

    # Memory and disk
    weight_bytes = 0
    for component in teacher.pipeline.components.values():
        if hasattr(component, "parameters"):
            weight_bytes += sum(p.numel() * p.element_size() for p in component.parameters())
    latent_bytes = math.prod(spec.latent_shape) * 2
    pair_bytes = latent_bytes + BYTES_PER_PROMPT
    if spec.keep_noise:
        pair_bytes += latent_bytes

    # Report
    cost: dict[str, float | int] = {
        "network_parameters": sum(p.numel() for p in teacher.network.parameters()),
        "weights_mib": round(weight_bytes / MIB, 1),
        "disk_mib": round(spec.count * pair_bytes / MIB, 1),
        "pairs_per_second": round(batch_size / batch_s, 3),
        "hours": round(hours, 2),
    }
    if price_per_gpu_hour is not None:
        cost["money"] = round(hours * price_per_gpu_hour, 2)
    return cost
