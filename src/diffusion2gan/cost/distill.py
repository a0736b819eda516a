"""The cost of a run before it starts: parameters, memory per component, disk, hours, money."""

from __future__ import annotations

import torch

from diffusion2gan.cost.limits import load_counted_teacher, reason_too_large
from diffusion2gan.distill.automatic import resolve_recipe
from diffusion2gan.distill.checks import check_discriminator, load_pairs_teacher
from diffusion2gan.distill.losses import Distance, build_distance
from diffusion2gan.distill.memory import (
    adam_bytes,
    count_r1_bytes,
    memory_bytes,
    num_bytes,
    num_trainable,
)
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import SPEC_FILE, open_set
from diffusion2gan.pipelines.timing import measure_seconds
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.storage import Location, list_names
from diffusion2gan.teacher.pipeline import Teacher

Cost = dict[str, float | int | str]
MIB = 2**20
FEW_PAIRS = 2
LONG_STEP_S = 30.0


def dry_run(recipe: Recipe, pairs: Location, price_per_gpu_hour: float | None = None) -> Cost:
    """Estimates the cost of a run; writes nothing.

    Parameters, memory and disk are counted from the teacher's configuration files. Time is measured
    by taking a few steps; if that is not possible here, `not_measured` is the reason.
    """
    # Count
    recipe = resolve_recipe(recipe)
    device = resolve_device(recipe.device)
    counted, reason = load_counted_teacher(recipe.teacher, recipe.teacher_config, recipe.resolution)
    has_pairs = SPEC_FILE in list_names(pairs)
    num_prompts = open_set(pairs).count if has_pairs else None
    if counted is not None:
        run = Run(recipe, counted)
        cost = count_cost(run, num_prompts, is_cpu=device.type == "cpu")
        size = sum(memory_bytes(run, device.type == "cpu").values())
        reason = reason or reason_too_large(size, device)
        if reason is None and not has_pairs:
            reason = f"{pairs} contains no pairs yet"
        if reason is not None:
            return cost | {"not_measured": f"time, because {reason}"}

    # Teacher and pairs, with the same checks as in `distill`
    reader = PairReader(pairs, recipe.seed)
    teacher = load_pairs_teacher(recipe, device, reader.spec, pairs)
    check_discriminator(recipe, teacher, reader, pairs)

    # Run
    run = Run(recipe, teacher)
    distance = build_distance(recipe, teacher.device, teacher)
    teacher.offload(network=not recipe.needs_teacher, vae=not recipe.needs_vae)

    # Measure
    cost = count_cost(run, reader.spec.count, is_cpu=device.type == "cpu")
    try:
        cost |= measure_cost(run, reader, distance, price_per_gpu_hour)
    except torch.OutOfMemoryError:
        cost["not_measured"] = (
            f"time, because a step does not fit into the memory of {device}: lower batch_size or "
            "raise gradient_accumulation_steps, or set gradient_checkpointing=true"
        )
    return cost


def count_cost(run: Run, num_prompts: int | None, *, is_cpu: bool) -> Cost:
    """Parameters, memory and disk of a run, and its number of steps.

    `num_prompts`: prompts whose embeddings are kept on disk with prompt_embeds=kept, if known.
    """
    recipe = run.recipe
    trained = run.student.trained
    memory = memory_bytes(run, is_cpu)

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
    if num_prompts is not None:
        prompts_size = prompts_bytes(run.teacher, num_prompts, recipe)
        cost["prompts_disk_mib"] = round(prompts_size / MIB, 2)
    cost["steps"] = -(-recipe.total_pairs // recipe.batch_size)
    return cost


def measure_cost(
    run: Run, reader: PairReader, distance: Distance, price_per_gpu_hour: float | None
) -> Cost:
    """Time and money of a run, and on a GPU its peak memory.

    Two steps of each kind (regression alone, with the discriminator) are taken, and the second is
    timed. On a CPU steps that would take long are estimated from a few pairs, which `extrapolated`
    states.
    """
    recipe = run.recipe

    # Steps of regression alone, before `gan_start_pairs`, are faster
    regression_pairs = 0
    regression_step_s = 0.0
    if run.discriminator is not None:
        regression_pairs = min(recipe.gan_start_pairs, recipe.total_pairs)
    step_s, is_extrapolated = measure_step(run, reader, distance, regression_pairs)
    if regression_pairs > 0:
        regression_step_s, _ = measure_step(run, reader, distance, 0)
    gan_pairs = recipe.total_pairs - regression_pairs
    seconds = (regression_pairs * regression_step_s + gan_pairs * step_s) / recipe.batch_size
    hours = seconds / 3600

    # Report
    cost: Cost = {
        "seconds_per_step": round(step_s, 3),
        "pairs_per_second": round(recipe.batch_size / step_s, 2),
        "hours": round(hours, 2),
    }
    if is_extrapolated:
        cost["extrapolated"] = f"time, from steps of {FEW_PAIRS} pairs"
    if run.teacher.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.teacher.device)
        cost["peak_memory_mib"] = round(peak / MIB, 1)
    if price_per_gpu_hour is not None:
        cost["money"] = round(hours * price_per_gpu_hour, 2)
    return cost


def measure_step(
    run: Run, reader: PairReader, distance: Distance, pairs_seen: int
) -> tuple[float, bool]:
    """(seconds of a step as if at `pairs_seen`, whether they are extrapolated).

    The second of two steps is timed. On a CPU a step of FEW_PAIRS pairs is measured first; if a
    full one would take more than LONG_STEP_S by that, it is not measured itself.
    """
    recipe = run.recipe
    if run.teacher.device.type == "cpu" and recipe.batch_size > FEW_PAIRS:
        few = {"batch_size": FEW_PAIRS, "gradient_accumulation_steps": 1}
        run.recipe = recipe.model_copy(update=few)
        try:
            few_s = time_second_step(run, reader, distance, pairs_seen)
        finally:
            run.recipe = recipe
        estimate = few_s * recipe.batch_size / FEW_PAIRS
        if estimate > LONG_STEP_S:
            return estimate, True
    return time_second_step(run, reader, distance, pairs_seen), False


def time_second_step(run: Run, reader: PairReader, distance: Distance, pairs_seen: int) -> float:
    """Seconds of the second of two steps."""
    batches = reader.batches(run.recipe.batch_size)
    run.pairs_seen = pairs_seen

    def take_step() -> None:
        step(run, next(batches), distance)

    take_step()
    return measure_seconds(take_step, str(run.teacher.device))


def prompts_bytes(teacher: Teacher, num_prompts: int, recipe: Recipe) -> int:
    """Bytes on disk of the kept embeddings, which are in half precision."""
    if recipe.prompt_embeds != "kept":
        return 0
    embeddings = teacher.encode([""]).tensors().values()
    return num_prompts * sum(tensor.numel() * 2 for tensor in embeddings)
