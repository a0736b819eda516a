"""What a run would take, before it starts: parameters, memory by part, disk, hours, money."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from diffusion2gan.distill.checks import check_discriminator, check_pairs
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run, load_recipe_teacher
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.pipeline import Teacher

Cost = dict[str, float | int | str]
MIB = 2**20


def size_of(*modules: nn.Module | None) -> int:
    """Bytes of all different tensors."""
    tensors = [t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def count_of(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)


def adam_size(recipe: Recipe, module: nn.Module | None) -> int:
    """Bytes of Adam's two averages. In 8 bits: of tensors of 4 096 numbers or more, a scale for every 256."""
    if module is None or recipe.optimizer == "adamw":
        return 2 * size_of(module)
    sizes = [p.numel() for p in module.parameters() if p.requires_grad]
    return sum(2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n for n in sizes)


def memory_of(run: Run) -> dict[str, int]:
    """Bytes on the device while training, by part; activations come on top and are measured, not counted."""
    teacher, recipe = run.teacher, run.recipe
    student, discriminator = size_of(run.student.trained), size_of(run.discriminator)
    texts = [
        part
        for name, part in teacher.pipeline.components.items()
        if name.startswith("text_encoder")
    ]
    return {
        "student_weights": student,
        "student_gradients_adam_average": 2 * student + adam_size(run.recipe, run.student.trained),
        "teacher_weights": size_of(teacher.network)
        if recipe.needs_teacher or teacher.device.type == "cpu"
        else 0,
        "discriminator_weights_gradients_adam": 2 * discriminator
        + adam_size(run.recipe, run.discriminator),
        "text_encoders": 0 if recipe.prompt_embeds == "kept" else size_of(*texts),
        "vae": size_of(teacher.vae)
        if recipe.loss == "pixel_lpips" or teacher.device.type == "cpu"
        else 0,
    }


def cost_of(
    run: Run, step: Callable[[], object], num_prompts: int, price_per_gpu_hour: float | None
) -> Cost:
    """Takes two steps of each kind, the second timed. What is kept of prompts on disk: `num_prompts` of them."""
    recipe = run.recipe
    memory = memory_of(run)
    alone = min(recipe.gan_start_pairs, recipe.total_pairs) if run.discriminator is not None else 0
    step_s = seconds_of(run, step, alone)
    alone_s = seconds_of(run, step, 0) if alone else 0.0
    steps = -(-recipe.total_pairs // recipe.batch_size)
    hours = (alone * alone_s + (recipe.total_pairs - alone) * step_s) / recipe.batch_size / 3600
    checkpoints = (
        1 + recipe.keep_checkpoints + recipe.keep_best
    )  # the new one is written before an old one goes
    checkpoint = 2 * size_of(run.student.trained) + adam_size(recipe, run.student.trained)
    checkpoint += size_of(run.discriminator) + adam_size(recipe, run.discriminator)
    cost: Cost = {
        "student_parameters": count_of(run.student.trained),
        "discriminator_parameters": count_of(run.discriminator),
        **{f"{part}_mib": round(bytes_ / MIB, 1) for part, bytes_ in memory.items()},
        "memory_without_activations_mib": round(sum(memory.values()) / MIB, 1),
        "checkpoint_disk_mib": round(checkpoints * checkpoint / MIB, 1),
        "prompts_disk_mib": round(prompts_disk(run.teacher, num_prompts, recipe) / MIB, 2),
        "steps": steps,
        "seconds_per_step": round(step_s, 3),
        "pairs_per_second": round(recipe.batch_size / step_s, 2),
        "hours": round(hours, 2),
    }
    if run.teacher.device.type == "cuda":
        cost["peak_memory_mib"] = round(
            torch.cuda.max_memory_allocated(run.teacher.device) / MIB, 1
        )
    if price_per_gpu_hour is not None:
        cost["money"] = round(hours * price_per_gpu_hour, 2)
    return cost


def seconds_of(run: Run, step: Callable[[], object], pairs_seen: int) -> float:
    """Of the second of two steps taken as if at `pairs_seen`."""
    run.pairs_seen = pairs_seen
    step()
    start = time.monotonic()
    step()
    return time.monotonic() - start


def prompts_disk(teacher: Teacher, num_prompts: int, recipe: Recipe) -> int:
    """Bytes that kept embeddings take: half precision."""
    if recipe.prompt_embeds != "kept":
        return 0
    return num_prompts * sum(
        tensor.numel() * 2 for tensor in teacher.encode([""]).tensors().values()
    )


def dry_run(recipe: Recipe, pairs: Location, price_per_gpu_hour: float | None = None) -> Cost:
    """What the run would cost (`cost.cost_of`), by some steps of it; nothing is written."""
    teacher = load_recipe_teacher(recipe, resolve_device(recipe.device))
    reader = PairReader(pairs, recipe.seed)
    check_pairs(reader.spec, teacher, pairs)
    check_discriminator(recipe, teacher, reader, pairs)
    run, distance = Run(recipe, teacher), build_distance(recipe, teacher.device, teacher)
    teacher.offload(network=not recipe.needs_teacher, vae=recipe.loss != "pixel_lpips")
    batches = reader.batches(recipe.batch_size)
    return cost_of(
        run, lambda: step(run, next(batches), distance), reader.spec.count, price_per_gpu_hour
    )
