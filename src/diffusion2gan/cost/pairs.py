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
LONG_BATCH_S = 60.0

Cost = dict[str, float | int | str]


def estimate_pairs_cost(
    teacher: Teacher, spec: PairsSpec, prompts: list[str], price_per_gpu_hour: float | None = None
) -> Cost:
    """Parameters, memory of the weights, disk, hours and, given a price, money.

    The hours are measured: `NUM_MEASURED_STEPS` ODE steps of one batch, after a warm-up step.
    `prompts` are those of the batch. On a CPU one prompt is measured first; if the steps of a batch
    would take longer than LONG_BATCH_S, the hours are of single prompts, and `extrapolated` states
    it.
    """
    cost = count_pairs_cost(teacher, spec)

    # Measure
    is_extrapolated = False
    if teacher.device.type == "cpu" and len(prompts) > 1:
        one_s = measure_batch(teacher, spec, prompts[:1])
        measured_s = len(prompts) * one_s * NUM_MEASURED_STEPS / spec.num_inference_steps
        is_extrapolated = measured_s > LONG_BATCH_S
    if is_extrapolated:
        pairs_per_second = 1 / one_s
    else:
        pairs_per_second = len(prompts) / measure_batch(teacher, spec, prompts)
    hours = spec.count / pairs_per_second / 3600

    # Report
    cost["pairs_per_second"] = round(pairs_per_second, 3)
    cost["hours"] = round(hours, 2)
    if is_extrapolated:
        cost["extrapolated"] = "time, from a single prompt"
    if price_per_gpu_hour is not None:
        cost["money"] = round(hours * price_per_gpu_hour, 2)
    return cost


def count_pairs_cost(teacher: Teacher, spec: PairsSpec) -> Cost:
    """Parameters, memory of the weights, and disk. The teacher's weights need no values."""
    latent_bytes = math.prod(spec.latent_shape) * 2
    pair_bytes = latent_bytes + BYTES_PER_PROMPT
    if spec.keep_noise:
        pair_bytes += latent_bytes

    return {
        "network_parameters": sum(p.numel() for p in teacher.network.parameters()),
        "weights_mib": round(weight_bytes(teacher) / MIB, 1),
        "disk_mib": round(spec.count * pair_bytes / MIB, 1),
    }


def weight_bytes(teacher: Teacher) -> int:
    """Bytes of the weights of all of the pipeline's models."""
    total = 0
    for component in teacher.pipeline.components.values():
        if hasattr(component, "parameters"):
            total += sum(p.numel() * p.element_size() for p in component.parameters())
    return total


def measure_batch(teacher: Teacher, spec: PairsSpec, prompts: list[str]) -> float:
    """Seconds of a batch: encoding, and as many ODE steps as the spec has."""
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
    return encoded - start + step_s * spec.num_inference_steps
