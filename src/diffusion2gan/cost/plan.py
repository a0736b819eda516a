"""The cost of pairs and training on many GPUs, by arithmetic on stated inputs. Nothing is run.

This is a model of throughput, not a measurement. Every input is in `GPUS`, `MODELS` or `Assumed`,
with its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.recipe import Recipe


@dataclass(frozen=True)
class Gpu:
    """Data-sheet values: dense bfloat16 peak, memory, and the links, in one direction.

    `nvlink_gb_s` is the bandwidth inside a node, `network_gb_s` a GPU's share of the node's
    network.
    """

    tflops: float
    memory_gib: float
    nvlink_gb_s: float
    network_gb_s: float
    dollars_per_h: float


@dataclass(frozen=True)
class Model:
    """A teacher's UNet.

    `forward_gmacs`: multiply-adds of one forward pass. `activations_gib`: of one pair in training.
    `r1_gib`: of the R1 penalty on one sample, by r1_method.
    """

    parameters: float
    forward_gmacs: float
    latent_shape: tuple[int, int, int]
    activations_gib: float
    r1_gib: Mapping[str, float]


# Peak, memory and NVLink: NVIDIA's data sheets (A100 SXM 80 GB, H100 SXM, H200 SXM). Network: one
# port of 200 or 400 Gb/s per GPU, as in DGX nodes. Prices: assumed, rounded rents; change them with
# --dollars-per-hour.
GPUS = {
    "a100": Gpu(312, 80, 300, 25, 2.0),
    "h100": Gpu(989, 80, 450, 50, 3.0),
    "h200": Gpu(989, 141, 450, 50, 3.5),
}
# Parameters: published. Multiply-adds: counted (torch's FlopCounterMode, attention included) in one
# forward pass at 64×64 (SD 1.5) and 128×128 (SDXL) with 77 tokens. Activations: assumed, with
# gradient checkpointing and bfloat16, student and discriminator together; not measured. R1: counted
# by `distill.memory.count_penalty_bytes`.
MODELS = {
    "sd15": Model(860e6, 402, (4, 64, 64), 2.0, {"exact": 19.5, "finite_differences": 5.3}),
    "sdxl": Model(2570e6, 3381, (4, 128, 128), 6.0, {"exact": 71.8, "finite_differences": 20.0}),
}
DEFAULT_MODEL = "sd15"
GPUS_PER_NODE = 8
BYTES_PER_PROMPT = 300  # prompt, index, seed and the file's overhead, per pair
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Assumed:
    """Inputs that are neither measured on these GPUs nor on a data sheet.

    utilisation: the share of the peak that UNets reach.
    loss_share: the compute time of the perceptual distance, relative to all else in a step.
    solver_steps: ODE steps per pair, the paper's. `pairs` takes 20 by default.
    reads_per_core: pairs/s of SD 1.5's size that one core reads, by processor time, from
        docs/results/pair_store.json.
    """

    utilisation: float = 0.35
    loss_share: float = 0.15
    solver_steps: int = 50
    reads_per_core: float = 5_500.0


ASSUMED = Assumed()


def choose_model(recipe: Recipe) -> tuple[str, str]:
    """The model in `MODELS` named like the recipe's teacher, or a default; and the reason."""
    name = Path(recipe.teacher).name
    if name in MODELS:
        return name, "the recipe's teacher"
    reason = (
        f"assumed: the recipe's teacher {recipe.teacher!r} is none of {', '.join(MODELS)}; --model"
    )
    return DEFAULT_MODEL, reason


def plan(
    model: str,
    gpu: str,
    num_gpus: int,
    num_pairs: float,
    recipe: Recipe,
    dollars_per_h: float | None = None,
    gradient_accumulation_steps: int | None = None,
) -> dict[str, Any]:
    """The figures of making `num_pairs` pairs ("pairs") and of training `recipe` ("distill").

    Throughput, disk, memory, compute and communication per step, hours and money. The batch of a
    GPU is split into `gradient_accumulation_steps` micro-batches; by default (not the recipe's
    value) into the fewest that fit in memory. Raises UserError for an unknown model or GPU, a LoRA
    recipe, or a batch that cannot be split evenly.
    """
    if model not in MODELS:
        raise UserError(f"no model {model!r}{nearest(model, MODELS)}")
    if gpu not in GPUS:
        raise UserError(f"no GPU {gpu!r}{nearest(gpu, GPUS)}")
    if recipe.lora_rank:
        raise UserError(
            f"the recipe trains a LoRA (lora_rank = {recipe.lora_rank}), and plan counts full "
            "training only: its memory and communication would be wrong. --set lora_rank=0 plans "
            "the training of all weights; `distill --dry-run` measures a LoRA."
        )
    _check_split(recipe.batch_size, num_gpus, gradient_accumulation_steps or 1)

    # Plan both stages
    model_figures = MODELS[model]
    gpu_figures = GPUS[gpu]
    steps = gradient_accumulation_steps or fewest_micro_batches(
        model_figures, gpu_figures, num_gpus, recipe
    )
    planned_recipe = recipe.model_copy(update={"gradient_accumulation_steps": steps})
    stages = {
        "pairs": _plan_pairs(model_figures, gpu_figures, num_gpus, num_pairs),
        "distill": _plan_training(model_figures, gpu_figures, num_gpus, planned_recipe),
    }

    # Cost
    price = gpu_figures.dollars_per_h if dollars_per_h is None else dollars_per_h
    for figures in stages.values():
        figures["dollars"] = figures["hours"] * num_gpus * price
    return stages


def _check_split(batch_size: int, num_gpus: int, gradient_accumulation_steps: int) -> None:
    """Raises UserError if the batch cannot be split evenly into GPUs × micro-batches."""
    if batch_size % (num_gpus * gradient_accumulation_steps) == 0:
        return
    micro_batches = ""
    if gradient_accumulation_steps > 1:
        micro_batches = f" and gradient_accumulation_steps = {gradient_accumulation_steps}"
    possible = ", ".join(map(str, divisors(batch_size // gradient_accumulation_steps)))
    raise UserError(
        f"batch_size {batch_size} cannot be split evenly over {num_gpus} GPUs{micro_batches}. "
        f"Possible numbers of GPUs: {possible}; or --set batch_size to a multiple of "
        f"{num_gpus * gradient_accumulation_steps}."
    )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def fewest_micro_batches(model: Model, gpu: Gpu, num_gpus: int, recipe: Recipe) -> int:
    """The fewest micro-batches of a GPU's share of the batch that fit in its memory.

    If none fit, one pair per micro-batch.
    """
    rows_per_gpu = recipe.batch_size // num_gpus
    for num in divisors(rows_per_gpu):
        if _training_memory_gib(model, rows_per_gpu // num, num_gpus, recipe) <= gpu.memory_gib:
            return num
    return rows_per_gpu


def _plan_pairs(model: Model, gpu: Gpu, num_gpus: int, num_pairs: float) -> dict[str, Any]:
    """Two forward passes per ODE step, with and without the prompt.

    Ranks do not communicate, so the throughput is proportional to the number of GPUs.
    """
    macs = 2 * ASSUMED.solver_steps * model.forward_gmacs * 1e9
    pairs_per_s = num_gpus * gpu.tflops * 1e12 * ASSUMED.utilisation / (2 * macs)
    bytes_per_pair = 2 * prod(model.latent_shape) + BYTES_PER_PROMPT
    return {
        "pairs_per_s": pairs_per_s,
        "hours": num_pairs / pairs_per_s / 3600,
        "disk_gib": num_pairs * bytes_per_pair / 2**30,
        "written_mb_per_s": pairs_per_s * bytes_per_pair / 1e6,
    }


def forwards_per_pair(adversarial: bool) -> float:
    """The compute of a training step per pair, in forward passes of the UNet.

    A backward pass counts as two forward passes, plus one to recompute activations under gradient
    checkpointing. Student: forward and backward, 4. With the discriminator, whose network has the
    same size: 3 more for the gradient with respect to its input; and its update, 1 forward pass of
    the student, and 2 · 4 for real and fake latents. The perceptual distance is added on top.
    """
    student = 4
    discriminator = 0
    if adversarial:
        student += 3
        discriminator = 1 + 2 * 4
    return (student + discriminator) * (1 + ASSUMED.loss_share)


def _plan_training(model: Model, gpu: Gpu, num_gpus: int, recipe: Recipe) -> dict[str, Any]:
    """Compute, then one all-reduce of float32 gradients per network, not overlapped with it.

    With strategy=fsdp the weights of each network are also gathered once per step, which adds half
    of the traffic of the all-reduce.
    """
    batch = recipe.batch_size
    adversarial = recipe.adversarial_weight > 0
    num_networks = 1 + adversarial

    # Compute
    flops = 2 * forwards_per_pair(adversarial) * model.forward_gmacs * 1e9 * batch / num_gpus
    compute_s = flops / (gpu.tflops * 1e12 * ASSUMED.utilisation)

    # Communication: a ring all-reduce sends twice, a gather once
    link_gb_s = gpu.nvlink_gb_s if num_gpus <= GPUS_PER_NODE else gpu.network_gb_s
    weight_bytes = num_networks * FLOAT32_BYTES * model.parameters
    row_bytes = FLOAT32_BYTES * batch * prod(model.latent_shape)  # logged latents
    reduced_bytes = weight_bytes + row_bytes
    gathered_bytes = weight_bytes if recipe.strategy == "fsdp" else 0.0
    sent_bytes = (num_gpus - 1) / num_gpus * (2 * reduced_bytes + gathered_bytes)
    communication_s = sent_bytes / (link_gb_s * 1e9)

    # Throughput and memory
    step_s = compute_s + communication_s
    pairs_per_s = batch / step_s
    num_steps = recipe.total_pairs / batch
    rows = batch // (num_gpus * recipe.gradient_accumulation_steps)
    memory = _training_memory_gib(model, rows, num_gpus, recipe)

    # A step with R1 has the states, and the penalty on one sample in place of the activations
    memory_with_r1 = 0.0
    if adversarial and recipe.r1_weight > 0:
        states = _training_memory_gib(model, 0, num_gpus, recipe)
        memory_with_r1 = states + model.r1_gib[recipe.r1_method]
    return {
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "compute_s": compute_s,
        "communication_s": communication_s,
        "step_s": step_s,
        "efficiency": compute_s / step_s,
        "pairs_per_s": pairs_per_s,
        "memory_gib_per_gpu": memory,
        "memory_with_r1_gib_per_gpu": memory_with_r1,
        "fits": max(memory, memory_with_r1) <= gpu.memory_gib,
        "reader_cores_per_gpu": pairs_per_s / reads_per_core(model),
        "read_mb_per_s_per_node": pairs_per_s * 2 * prod(model.latent_shape) / 1e6,
        "steps": num_steps,
        "hours": num_steps * step_s / 3600,
    }


def reads_per_core(model: Model) -> float:
    """Pairs/s that one core reads, inversely proportional to the size of the latents.

    Every rank reads the full batch.
    """
    return ASSUMED.reads_per_core * prod(MODELS["sd15"].latent_shape) / prod(model.latent_shape)


def _training_memory_gib(model: Model, rows: int, num_gpus: int, recipe: Recipe) -> float:
    num_shards = num_gpus if recipe.strategy == "fsdp" else 1
    return memory_gib(model, rows, recipe.adversarial_weight > 0, num_shards)


def memory_gib(model: Model, rows: int, adversarial: bool, num_shards: int = 1) -> float:
    """The memory of training on one GPU, with activations of `rows` pairs.

    In float32, per parameter: the student's weight, gradient, two Adam averages and EMA (5); the
    discriminator's weight, gradient and Adam averages (4); the all-reduce buffer (1). The
    teacher's text encoders are not counted.

    Sharded over `num_shards` GPUs: a shard of the states, and in a step the full weights of both
    networks, the full gradient of one, and the buffer.
    """
    states = 5 + 4 * adversarial
    numbers = states + 1.0
    if num_shards > 1:
        numbers = states / num_shards + (1 + adversarial) + 1 + 1
    weights_gib = numbers * FLOAT32_BYTES * model.parameters / 2**30
    return weights_gib + rows * model.activations_gib


def table(
    cases: Sequence[tuple[str, float]], gpu: str, sizes: Sequence[int], recipe: Recipe
) -> list[str]:
    """The table rows of docs/scale.md, for each (model, number of pairs) and number of GPUs."""
    rows = []
    for model, num_pairs in cases:
        for num_gpus in sizes:
            stages = plan(model, gpu, num_gpus, num_pairs, recipe)
            pairs = stages["pairs"]
            training = stages["distill"]
            too_much = "" if training["fits"] else ": too much"
            cells = [
                model,
                f"{num_pairs / 1e6:g} M",
                str(num_gpus),
                f"{pairs['pairs_per_s']:.0f}",
                f"{pairs['hours']:.1f}",
                f"{pairs['disk_gib']:.0f}",
                str(training["gradient_accumulation_steps"]),
                f"{training['compute_s']:.3f} + {training['communication_s']:.3f}",
                f"{training['efficiency']:.0%}",
                f"{training['memory_gib_per_gpu']:.0f}{too_much}",
                f"{training['hours']:.1f}",
                f"{pairs['dollars'] + training['dollars']:,.0f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return rows
