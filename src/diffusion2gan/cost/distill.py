"""The cost of a run before it starts: parameters, memory per component, disk, hours, money."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from diffusion2gan.distill.checks import check_discriminator, check_pairs
from diffusion2gan.distill.losses import build_distance
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


def memory_bytes(run: Run) -> dict[str, int]:
    """Bytes on the device during training, by component, without activations.

    Activations come on top; they are measured (`peak_memory_mib`), not counted.
    """
    recipe = run.recipe
    teacher = run.teacher
    trained = run.student.trained
    student = num_bytes(trained)
    discriminator = num_bytes(run.discriminator)

    # Models that are offloaded from a GPU stay in memory if the device is the CPU
    is_cpu = teacher.device.type == "cpu"
    teacher_weights = 0
    if recipe.needs_teacher or is_cpu:
        teacher_weights = num_bytes(teacher.network)
    vae = 0
    if recipe.needs_vae or is_cpu:
        vae = num_bytes(teacher.vae)

    text_encoders = 0
    if recipe.prompt_embeds == "encoded":
        components = teacher.pipeline.components.items()
        encoders = [module for name, module in components if name.startswith("text_encoder")]
        text_encoders = num_bytes(*encoders)

    return {
        "student_weights": student,
        "student_gradients_adam_average": 2 * student + adam_bytes(recipe, trained),
        "teacher_weights": teacher_weights,
        "discriminator_weights_gradients_adam": (
            2 * discriminator + adam_bytes(recipe, run.discriminator)
        ),
        "text_encoders": text_encoders,
        "vae": vae,
    }


def num_bytes(*modules: nn.Module | None) -> int:
    """Bytes of all parameters and buffers; shared tensors count once."""
    sizes: dict[int, int] = {}
    for module in modules:
        if module is None:
            continue
        for tensor in (*module.parameters(), *module.buffers()):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def num_trainable(module: nn.Module | None) -> int:
    """The number of trainable parameters."""
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def adam_bytes(recipe: Recipe, module: nn.Module | None) -> int:
    """Bytes of Adam's two averages.

    With 8 bits, tensors of 4 096 elements or more have a byte per element and a float32 scale per
    256 elements; smaller ones stay in float32.
    """
    if module is None or recipe.optimizer == "adamw":
        return 2 * num_bytes(module)

    total = 0
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        numel = parameter.numel()
        if numel >= 4096:
            num_blocks = -(-numel // 256)
            total += 2 * (numel + 4 * num_blocks)
        else:
            total += 2 * 4 * numel
    return total


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
