"""`diffusion2gan plan`: what pairs and training cost on many GPUs, by arithmetic on stated inputs. Nothing is run.

A model of throughput, not a measurement. Every input is in `GPUS`, `MODELS` or `Assumed`, with where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.recipe import Recipe


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values: dense bfloat16 peak, memory, one direction of the links to the node and out of it."""

    tflops: float
    memory_gib: float
    nvlink_gb_s: float
    network_gb_s: float
    dollars_per_h: float


@dataclass(frozen=True)
class Model:
    """A teacher's UNet: parameters, multiply-adds of one forward, latents, and activations of one pair in training."""

    parameters: float
    forward_gmacs: float
    latent_shape: tuple[int, int, int]
    activations_gib: float


# Peaks, memory and NVLink: NVIDIA's data sheets (A100 SXM 80 GB, H100 SXM, H200 SXM). Network: one 200 or 400 Gb/s port
# a GPU, as DGX nodes have. Prices: assumed, round numbers of rented machines; change them with --dollars-per-hour.
GPUS = {
    "a100": Gpu(312, 80, 300, 25, 2.0),
    "h100": Gpu(989, 80, 450, 50, 3.0),
    "h200": Gpu(989, 141, 450, 50, 3.5),
}
# Parameters: published. Multiply-adds: published counts of one 64×64 (SD 1.5) and 128×128 (SDXL) forward, rounded.
# Activations: guesses with gradient checkpointing and bfloat16, student and D together; not measured.
MODELS = {
    "sd15": Model(860e6, 340, (4, 64, 64), 2.0),
    "sdxl": Model(2570e6, 2980, (4, 128, 128), 6.0),
}


@dataclass(frozen=True)
class Assumed:
    """What is neither measured nor on a data sheet."""

    utilisation: float = 0.35  # share of the peak that UNets reach
    loss_share: float = (
        0.15  # the perceptual distance's share of a step's compute; METHOD: 12 ms of a step
    )
    solver_steps: int = 50
    reads_per_core: float = (
        5_500.0  # pairs/s of SD 1.5's size: docs/results/pair_store.json, processor time
    )


ASSUMED = Assumed()
GPUS_PER_NODE = 8


DEFAULT_MODEL = "sd15"


def model_of(recipe: Recipe) -> tuple[str, str]:
    """The model that a recipe's teacher names, by its last part, and why it is that one."""
    name = Path(recipe.teacher).name
    if name in MODELS:
        return name, "the recipe's teacher"
    return (
        DEFAULT_MODEL,
        f"assumed: the recipe's teacher {recipe.teacher!r} is none of {', '.join(MODELS)}; --model",
    )


def plan(
    model: str,
    gpu: str,
    num_gpus: int,
    num_pairs: float,
    recipe: Recipe,
    dollars_per_h: float | None = None,
    gradient_accumulation_steps: int | None = None,
) -> dict[str, Any]:
    """Pairs/s, disk, memory, communication and compute of a step, hours and money, of making pairs and of `recipe`.

    A batch is worked in `gradient_accumulation_steps` parts, or where none are given in the fewest that fit, whatever the recipe says.
    Raises UserError at an unknown model or GPU, a LoRA, or a batch that the GPUs cannot share.
    """
    if model not in MODELS:
        raise UserError(f"no model {model!r}{nearest(model, MODELS)}")
    if gpu not in GPUS:
        raise UserError(f"no GPU {gpu!r}{nearest(gpu, GPUS)}")
    if recipe.lora_rank:
        raise UserError(
            f"the recipe trains a LoRA (lora_rank = {recipe.lora_rank}), and plan counts full training only: its "
            "memory and sums would be wrong. --set lora_rank=0 plans all weights; `distill --dry-run` measures a LoRA."
        )
    _check_cut(recipe.batch_size, num_gpus, gradient_accumulation_steps or 1)
    kind, machine = MODELS[model], GPUS[gpu]
    price = machine.dollars_per_h if dollars_per_h is None else dollars_per_h
    parts = gradient_accumulation_steps or fewest_parts(kind, machine, num_gpus, recipe)
    stages = {
        "pairs": _making(kind, machine, num_gpus, num_pairs),
        "distill": _training(
            kind,
            machine,
            num_gpus,
            recipe.model_copy(update={"gradient_accumulation_steps": parts}),
        ),
    }
    for stage in stages.values():
        stage["dollars"] = stage["hours"] * num_gpus * price
    return stages


def _check_cut(batch_size: int, num_gpus: int, gradient_accumulation_steps: int) -> None:
    if batch_size % (num_gpus * gradient_accumulation_steps):
        parts = (
            f" in gradient_accumulation_steps = {gradient_accumulation_steps} parts"
            if gradient_accumulation_steps > 1
            else ""
        )
        would_do = ", ".join(map(str, divisors(batch_size // gradient_accumulation_steps)))
        raise UserError(
            f"batch_size {batch_size}{parts} cannot be cut over {num_gpus} GPUs. Numbers of GPUs that would do: "
            f"{would_do}; or --set batch_size to a multiple of {num_gpus * gradient_accumulation_steps}."
        )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def fewest_parts(model: Model, gpu: Gpu, num_gpus: int, recipe: Recipe) -> int:
    """The fewest parts of a GPU's share of the batch that fit its memory; one pair a part where none do."""
    share = recipe.batch_size // num_gpus
    fit = [
        n
        for n in divisors(share)
        if _memory_gib(model, share // n, num_gpus, recipe) <= gpu.memory_gib
    ]
    return min(fit, default=share)


def _making(model: Model, gpu: Gpu, num_gpus: int, num_pairs: float) -> dict[str, Any]:
    """Two forwards a step, with and without the prompt. Ranks never talk, so it scales with the GPUs."""
    macs = 2 * ASSUMED.solver_steps * model.forward_gmacs * 1e9
    pace = num_gpus * gpu.tflops * 1e12 * ASSUMED.utilisation / (2 * macs)
    bytes_per_pair = 2 * prod(model.latent_shape) + 300
    return {
        "pairs_per_s": pace,
        "hours": num_pairs / pace / 3600,
        "disk_gib": num_pairs * bytes_per_pair / 2**30,
        "written_mb_per_s": pace * bytes_per_pair / 1e6,
    }


def forwards_per_pair(adversarial: bool) -> float:
    """A step in forwards of the UNet, a backward being two and, with checkpointing, one more of its forward.

    Student: forward and backward, 4. With D, whose network is as large: 3 more for the gradient to D's input; and D's
    own step, a student's forward and D's forward and backward on real and fake, 1 + 2·4. The distance is on top.
    """
    student, discriminator = 4 + 3 * adversarial, 9 * adversarial
    return (student + discriminator) * (1 + ASSUMED.loss_share)


def _training(model: Model, gpu: Gpu, num_gpus: int, recipe: Recipe) -> dict[str, Any]:
    """Compute, then one sum of float32 gradients a player, not overlapped with it: what `distill` does.

    With strategy=fsdp each player's weights are gathered once a step too: half as much again.
    """
    batch, adversarial = recipe.batch_size, recipe.adversarial_weight > 0
    flops = 2 * forwards_per_pair(adversarial) * model.forward_gmacs * 1e9 * batch / num_gpus
    compute_s = flops / (gpu.tflops * 1e12 * ASSUMED.utilisation)
    link = gpu.nvlink_gb_s if num_gpus <= GPUS_PER_NODE else gpu.network_gb_s
    rows_bytes = 4 * batch * prod(model.latent_shape)
    sent_bytes = (1 + adversarial) * 4 * model.parameters + rows_bytes
    gathered_bytes = (1 + adversarial) * 4 * model.parameters if recipe.strategy == "fsdp" else 0.0
    communication_s = (num_gpus - 1) / num_gpus * (2 * sent_bytes + gathered_bytes) / (link * 1e9)
    step_s = compute_s + communication_s
    pace, steps = batch / step_s, recipe.total_pairs / batch
    memory = _memory_gib(
        model, batch // (num_gpus * recipe.gradient_accumulation_steps), num_gpus, recipe
    )
    return {
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "compute_s": compute_s,
        "communication_s": communication_s,
        "step_s": step_s,
        "efficiency": compute_s / step_s,
        "pairs_per_s": pace,
        "memory_gib_per_gpu": memory,
        "fits": memory <= gpu.memory_gib,
        "reader_cores_per_gpu": pace / reads_per_core(model),
        "read_mb_per_s_per_node": pace * 2 * prod(model.latent_shape) / 1e6,
        "steps": steps,
        "hours": steps * step_s / 3600,
    }


def reads_per_core(model: Model) -> float:
    """Every rank reads the whole batch; the time goes with the bytes."""
    return ASSUMED.reads_per_core * prod(MODELS["sd15"].latent_shape) / prod(model.latent_shape)


def _memory_gib(model: Model, rows: int, num_gpus: int, recipe: Recipe) -> float:
    return memory_gib(
        model, rows, recipe.adversarial_weight > 0, num_gpus if recipe.strategy == "fsdp" else 1
    )


def memory_gib(model: Model, rows: int, adversarial: bool, holders: int = 1) -> float:
    """Student with gradient, two moments and average, D with gradient and moments, and the buffer of the sum, in
    float32; activations of `rows` pairs. The teacher's encoders are not counted.

    Cut over `holders` GPUs: a part of all that, and whole in a step both players, one's gradient, and the buffer.
    """
    numbers = 5 + 4 * adversarial + 1.0
    if holders > 1:
        numbers = (5 + 4 * adversarial) / holders + 1 + adversarial + 1 + 1
    return numbers * 4 * model.parameters / 2**30 + rows * model.activations_gib


def table(
    cases: Sequence[tuple[str, float]], gpu: str, sizes: Sequence[int], recipe: Recipe
) -> list[str]:
    """The rows of docs/scale.md, each with the fewest parts of a batch that fit."""
    rows = []
    for model, count in cases:
        for num in sizes:
            told = plan(model, gpu, num, count, recipe)
            pairs, step = told["pairs"], told["distill"]
            cells = [
                model,
                f"{count / 1e6:g} M",
                str(num),
                f"{pairs['pairs_per_s']:.0f}",
                f"{pairs['hours']:.1f}",
                f"{pairs['disk_gib']:.0f}",
                str(step["gradient_accumulation_steps"]),
                f"{step['compute_s']:.3f} + {step['communication_s']:.3f}",
                f"{step['efficiency']:.0%}",
                f"{step['memory_gib_per_gpu']:.0f}{'' if step['fits'] else ': too much'}",
                f"{step['hours']:.1f}",
                f"{(pairs['dollars'] + step['dollars']):,.0f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return rows
