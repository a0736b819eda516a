"""The cost of a run before it starts: parameters, memory per component, disk, hours, money."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffusion2gan.distill.checks import check_discriminator, check_pairs
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.memory import (
    adam_bytes,
    count_r1_bytes,
    memory_bytes,
    num_bytes,
    num_trainable,
)
from diffusion2gan.distill.run import Run, load_recipe_teacher
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pipelines.timing import measure_seconds
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.pipeline import Teacher

Cost = dict[str, float | int | str]
MIB = 2**20


def dry_run(recipe: Recipe, pairs: Location, price_per_gpu_hour: float | None = None) -> Cost:
    """Estimates the cost of a run (`estimate_cost`) by taking a few steps of it; writes nothing."""
    # Teacher and pairs, with the same checks as in `distill`
    teacher = load_recipe_teacher(recipe, resolve_device(recipe.device))
    reader = PairReader(pairs, recipe.seed)
    check_pairs(reader.spec, teacher, pairs)
    check_discriminator(recipe, teacher, reader, pairs)

    # Run
    run = Run(recipe, teacher)
    distance = build_distance(recipe, teacher.device, teacher)
    teacher.offload(network=not recipe.needs_teacher, vae=not recipe.needs_vae)

    batches = reader.batches(recipe.batch_size)

    def take_step() -> None:
        step(run, next(batches), distance)

    return estimate_cost(run, take_step, reader.spec.count, price_per_gpu_hour)


def estimate_cost(
    run: Run,
    take_step: Callable[[], None],
    num_prompts: int,
    price_per_gpu_hour: float | None,
) -> Cost:
    """Parameters, memory, disk, time and money of a run.

    It takes two steps of each kind (regression alone, with the discriminator) and times the second.
    `num_prompts`: prompts whose embeddings are kept on disk with prompt_embeds=kept.
    """
    recipe = run.recipe
    teacher = run.teacher
    trained = run.student.trained
    memory = memory_bytes(run)

    # Time: steps of regression alone, before `gan_start_pairs`, are faster
    regression_pairs = 0
    regression_step_s = 0.0
    if run.discriminator is not None:
        regression_pairs = min(recipe.gan_start_pairs, recipe.total_pairs)
    step_s = measure_step(run, take_step, regression_pairs)
    if regression_pairs > 0:
        regression_step_s = measure_step(run, take_step, 0)
    gan_pairs = recipe.total_pairs - regression_pairs
    seconds = (regression_pairs * regression_step_s + gan_pairs * step_s) / recipe.batch_size
    hours = seconds / 3600

    # Disk: a new checkpoint is written before an old one is removed
    num_checkpoints = 1 + recipe.keep_checkpoints + recipe.keep_best
    checkpoint_size = 2 * num_bytes(trained) + adam_bytes(recipe, trained)
    checkpoint_size += num_bytes(run.discriminator) + adam_bytes(recipe, run.discriminator)

    # Report
    cost: Cost = {
        "student_parameters": num_trainable(trained),
        "discriminator_parameters": num_trainable(run.discriminator),
    }
    for component, size in memory.items():
        cost[f"{component}_mib"] = round(size / MIB, 1)
    cost["memory_without_activations_mib"] = round(sum(memory.values()) / MIB, 1)
    if run.discriminator is not None and recipe.r1_weight > 0:
        # On one sample, beside the memory above: activations and both derivatives
        cost["r1_peak_mib"] = round(count_r1_bytes(run, recipe.r1_method) / MIB, 1)
    cost["checkpoint_disk_mib"] = round(num_checkpoints * checkpoint_size / MIB, 1)
    cost["prompts_disk_mib"] = round(prompts_bytes(teacher, num_prompts, recipe) / MIB, 2)
    cost["steps"] = -(-recipe.total_pairs // recipe.batch_size)
    cost["seconds_per_step"] = round(step_s, 3)
    cost["pairs_per_second"] = round(recipe.batch_size / step_s, 2)
    cost["hours"] = round(hours, 2)
    if teacher.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(teacher.device)
        cost["peak_memory_mib"] = round(peak / MIB, 1)
    if price_per_gpu_hour is not None:
        cost["money"] = round(hours * price_per_gpu_hour, 2)
    return cost


def measure_step(run: Run, take_step: Callable[[], None], pairs_seen: int) -> float:
    """Seconds of the second of two steps, taken as if at `pairs_seen`."""
    run.pairs_seen = pairs_seen
    take_step()
    return measure_seconds(take_step, str(run.teacher.device))


def prompts_bytes(teacher: Teacher, num_prompts: int, recipe: Recipe) -> int:
    """Bytes on disk of the kept embeddings, which are in half precision."""
    if recipe.prompt_embeds != "kept":
        return 0
    embeddings = teacher.encode([""]).tensors().values()
    return num_prompts * sum(tensor.numel() * 2 for tensor in embeddings)
