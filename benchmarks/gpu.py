"""The measurements that need a GPU, in one process, the most valuable first, until a deadline.

    python benchmarks/gpu.py --seconds 330 --out work/gpu.json    # on one GPU
    python benchmarks/gpu.py --pocket --out work/gpu.json         # the same rows, on the CPU

Rows: agreement with the CPU; the training step at Stable Diffusion 1.5's size; the cost of the
loss; the memory of the 24 GB recipes; one step against 50; pairs/s. Each is a row of
loss_cost.py, train_step.py or one_step.py with the options that its "command" names; imports and
the start of CUDA are paid for once.

The result file is written after every row. A row that fails, or takes longer than its limit, is
recorded as such and the next one starts. A row for which too little time is left is skipped.
GPU: not measured.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Fewer failures by fragmentation, since the rows need blocks of different sizes. It must be set
# before CUDA starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import loss_cost
import one_step
import torch
import train_step
from real_sizes import random_teacher

from diffusion2gan.cost.pairs import estimate_pairs_cost
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import PairsSettings, build_spec
from diffusion2gan.pairs.store import Pairs
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.files import write_json
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.ode import solve_ode

H100_TFLOPS = 798.0  # dense bfloat16 matrix products, measured on an H100
PROMPTS = ["a blue star on sand", "two red rings on grass", "a green disc on water"]

# TFLOP per image at Stable Diffusion 1.5's size, counted: 2 × multiply-adds, attention included.
# A backward pass counts as two forward passes.
STUDENT_TFLOP = 2.41
E_LATENT_LPIPS_TFLOP = 0.92
WITH_D_TFLOP = 12.8

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A measurement. `needed_s`: it is skipped if less time is left; `limit_s`: it is stopped."""

    name: str
    measure: Callable[[], Metrics]
    needed_s: float = 10.0
    limit_s: float = 90.0
    command: str = ""


class TooLongError(BaseException):
    """A row took longer than its limit; no `except Exception` in a library may swallow it."""


# Rows of the other benchmarks


def training_row(
    name: str, row: str, options: str, *, tflop: float | None = None, **limits: float
) -> Row:
    """A row of train_step.py; with `tflop` per image, also its share of the H100's peak."""
    args = train_step.parse_args(shlex.split(options))

    def measure() -> Metrics:
        metrics: Metrics = train_step.measure(row, args)
        if tflop is not None and args.device == "cuda":
            achieved = metrics["images_per_second"] * tflop
            metrics["share_of_h100_peak"] = achieved / H100_TFLOPS
        return metrics

    rows = "" if args.recipe else f" --rows {row}"
    return Row(name, measure, command=f"train_step.py {options}{rows}", **limits)


def loss_row(row: str, options: str) -> Row:
    """A row of loss_cost.py."""
    args = loss_cost.parse_args(shlex.split(options))
    name = f"loss: {args.size}, {args.dtype}, batch {args.batch}, {row}"

    def measure() -> Metrics:
        return loss_cost.measure(row, args)

    return Row(name, measure, needed_s=6, limit_s=30, command=f"loss_cost.py {options} --row {row}")


def latency_row(name: str, options: str, **limits: float) -> Row:
    """one_step.py: one step against the teacher's steps."""
    args = one_step.parse_args(shlex.split(options))

    def measure() -> Metrics:
        result = one_step.compare(args)
        metrics: Metrics = {"times_faster": result["times_faster"]}
        for label, row in result["rows"].items():
            for key, value in row.items():
                metrics[f"{label} {key}"] = value
        return metrics

    return Row(name, measure, command=f"one_step.py {options}", **limits)


# Rows without a benchmark of their own


def measure_pairs(size: str, device: str, batch_size: int) -> Metrics:
    """Pairs/s of `pairs` with its default settings, as `pairs --dry-run` estimates them."""
    teacher = random_teacher(size, device)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch_size)]
    spec = build_spec(teacher, prompts, PairsSettings(count=batch_size))
    cost = estimate_pairs_cost(teacher, spec, prompts)
    return {"batch": batch_size, "pairs_per_second": cost["pairs_per_second"]}


def measure_agreement(device: str) -> Metrics:
    """Relative differences between `device` and the CPU, on the pocket teacher in float32.

    ‖a − b‖ / ‖b‖ of: latents of the teacher's ODE, the student's one step, E-LatentLPIPS with its
    gradients through the student, and the discriminator's gradients with R1. With cuDNN's TF32, as
    torch sets it by default, and without.
    """
    expected = compute_reference_values("cpu")
    allow_tf32 = torch.backends.cudnn.allow_tf32
    metrics: Metrics = {}
    try:
        for tf32 in (True, False):
            torch.backends.cudnn.allow_tf32 = tf32
            label = "with TF32" if tf32 else "without TF32"
            for name, value in compute_reference_values(device).items():
                difference = (value - expected[name]).norm() / expected[name].norm()
                metrics[f"{name}, {label}"] = float(difference)
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32
    return metrics


def compute_reference_values(device: str) -> dict[str, torch.Tensor]:
    """One training step with discriminator and R1, and what it is built on: tensors on the CPU."""
    teacher = load_teacher("pocket", device)
    recipe = Recipe.model_validate(
        {
            "loss": "e_latent_lpips",
            "batch_size": len(PROMPTS),
            "adversarial_weight": 0.5,
            "discriminator_warmup": 0,
            "r1_weight": 1e-7,
            "r1_every": 1,
            "device": device,
        }
    )
    run = Run(recipe, teacher)

    # The teacher's ODE, in few steps, and the student's single one
    seeds = list(range(len(PROMPTS)))
    noise = noise_from_seeds(seeds, teacher.latent_shape).to(teacher.device)
    cond = teacher.encode(PROMPTS)
    uncond = teacher.unconditional().expand(len(PROMPTS))
    latents = solve_ode(teacher, noise, cond, uncond, 4, 3.0).cpu()
    with torch.no_grad():
        output = run.student(noise, cond).cpu()

    # One update of both networks; the gradients remain after it
    pairs = Pairs(seeds, seeds, PROMPTS, latents)
    entry = step(run, pairs, build_distance(recipe, teacher.device, teacher))[0].read()
    assert run.discriminator is not None
    return {
        "teacher's latents": latents,
        "student's latents": output,
        "loss": torch.tensor(entry["loss"]),
        "student's gradients": flat_gradients(run.student.trained),
        "discriminator's gradients": flat_gradients(run.discriminator),
    }


def flat_gradients(module: torch.nn.Module) -> torch.Tensor:
    gradients = []
    for parameter in module.parameters():
        if parameter.grad is not None:
            gradients.append(parameter.grad.detach().cpu().flatten())
    return torch.cat(gradients)


# The list of rows


def gpu_rows() -> list[Row]:
    """All rows for one GPU of 80 GB, the most valuable first."""
    sd15 = "--size sd15 --device cuda --precision bfloat16"
    sdxl = "--size sdxl --device cuda --precision bfloat16"
    batch = "--batch 32 --repeats 6"
    with_d = f"{sd15} --batch 32 --repeats 3 --gradient-checkpointing"
    with_lpips = STUDENT_TFLOP + E_LATENT_LPIPS_TFLOP

    # Training steps at Stable Diffusion 1.5's size
    rows = [
        Row("agreement with the CPU", lambda: measure_agreement("cuda")),
        training_row("step: sd15, mse", "mse", f"{sd15} {batch}", tflop=STUDENT_TFLOP),
        training_row(
            "step: sd15, e_latent_lpips", "e_latent_lpips", f"{sd15} {batch}", tflop=with_lpips
        ),
    ]

    # The loss alone
    for row in loss_cost.ROWS:
        rows.append(loss_row(row, "--size sd15 --device cuda --dtype bfloat16 --batch 4"))

    # Memory of the recipes for 24 GB; the discriminator; one step; pairs
    for size, options in (("sd15", sd15), ("sdxl", sdxl)):
        recipe = f"{size}-lora-24gb"
        recipe_options = f"{options} --repeats 1 --recipe {recipe}"
        rows.append(training_row(f"recipe: {recipe}", recipe, recipe_options, needed_s=20))
    rows.append(training_row("step: sd15, with D", "with_d", with_d, tflop=WITH_D_TFLOP))
    rows.append(training_row("step: sd15, with D and R1", "with_d_and_r1", with_d, needed_s=20))
    latency = "--device cuda --precision float16"
    rows.append(latency_row("one step: sd15", f"--size sd15 {latency} --repeats 8", needed_s=25))
    rows.append(Row("pairs: sd15, batch 16", lambda: measure_pairs("sd15", "cuda", 16)))
    rows.append(latency_row("one step: sdxl", f"--size sdxl {latency} --repeats 5", needed_s=45))

    # The loss at Stable Diffusion XL's size, and in float32
    for size, batch_size in (("sdxl", 1), ("sd15", 4)):
        dtype = "bfloat16" if size == "sdxl" else "float32"
        for row in loss_cost.ROWS:
            options = f"--size {size} --device cuda --dtype {dtype} --batch {batch_size}"
            rows.append(loss_row(row, options))

    # Options that may pay, and the full recipe
    options = f"{sd15} {batch} --channels-last"
    name = "step: sd15, mse, channels-last"
    rows.append(training_row(name, "mse", options, tflop=STUDENT_TFLOP))
    full = f"{sd15} --repeats 1 --recipe sd15"
    rows.append(training_row("recipe: sd15", "sd15", full, needed_s=25))
    compiled = f"{sd15} {batch} --compile"
    limits = {"needed_s": 150.0, "limit_s": 240.0}
    name = "step: sd15, mse, compiled"
    rows.append(training_row(name, "mse", compiled, tflop=STUDENT_TFLOP, **limits))
    return rows


def pocket_rows() -> list[Row]:
    """The same kinds of rows at pocket size on a CPU, as a test of this script."""
    step_options = "--size pocket --device cpu --batch 2 --repeats 1"
    loss_options = "--size pocket --device cpu --repeats 1"
    rows = [
        Row("agreement with the CPU", lambda: measure_agreement("cpu")),
        training_row("step: pocket, mse", "mse", step_options),
        training_row("step: pocket, e_latent_lpips", "e_latent_lpips", step_options),
    ]
    for row in loss_cost.ROWS:
        rows.append(loss_row(row, loss_options))
    rows.append(training_row("step: pocket, lora", "lora", step_options))
    rows.append(training_row("step: pocket, with D and R1", "with_d_and_r1", step_options))
    latency = "--size pocket --device cpu --steps 2 --repeats 2"
    rows.append(latency_row("one step: pocket", latency))
    rows.append(Row("pairs: pocket, batch 4", lambda: measure_pairs("pocket", "cpu", 4)))
    return rows


# Running them


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLongError inside the block after `seconds`, once the current kernel returns."""

    def stop(signal_number: int, frame: object) -> None:
        raise TooLongError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_row(row: Row, seconds_left: float) -> Metrics:
    """The row's metrics, or why there are none: "skipped", "failed" or "stopped"."""
    if seconds_left < row.needed_s:
        return {"skipped": f"{seconds_left:.0f} s were left, about {row.needed_s:.0f} s are needed"}

    limit_s = min(row.limit_s, seconds_left)
    start = time.monotonic()
    try:
        with time_limit(limit_s):
            metrics = row.measure()
    except TooLongError:
        metrics = {"stopped": f"took longer than {limit_s:.0f} s"}
    except Exception as error:
        metrics = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    metrics["took_s"] = round(time.monotonic() - start, 1)
    if row.command:
        metrics["command"] = row.command
    return metrics


def run_rows(rows: Sequence[Row], seconds: float, out: Path, result: Metrics) -> None:
    """Runs `rows` in order within `seconds`; writes `result` to `out` after each."""
    start = time.monotonic()
    result["rows"] = {}
    for row in rows:
        metrics = run_row(row, seconds - (time.monotonic() - start))
        result["rows"][row.name] = metrics
        write_json(out, result)
        print(f"{time.monotonic() - start:6.0f} s  {row.name:48}{summary(metrics)}", flush=True)

        # Free the row's memory before the next one
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def summary(metrics: Metrics) -> str:
    """The numbers of a row, or why there are none, on one line."""
    for reason in ("skipped", "failed", "stopped"):
        if reason in metrics:
            return f"{reason}: {metrics[reason]}"
    numbers = []
    for key, value in metrics.items():
        if isinstance(value, float) and key != "took_s":
            numbers.append(f"{key} {value:.4g}")
    return ", ".join(numbers)


def check_targets(rows: dict[str, Metrics]) -> dict[str, Metrics]:
    """Each target with its measured value (None without one) and whether it is reached."""

    def value(row: str, key: str) -> float:
        return float(rows.get(row, {}).get(key, math.nan))

    mse = value("step: sd15, mse", "images_per_second")
    e_latent_lpips = value("step: sd15, e_latent_lpips", "images_per_second")
    measured = [
        ("sd15 mse, images/s (the paper's node)", mse, ">=", 138.4),
        ("sd15 e_latent_lpips / mse", e_latent_lpips / mse, ">=", 0.85),
        ("one step, sd15, ms", value("one step: sd15", "one step ms"), "<=", 30.0),
        ("50 steps / one step, sd15", value("one step: sd15", "times_faster"), ">=", 60.0),
    ]

    # pixel_lpips against e_latent_lpips; the paper has 9.7
    for size, batch in (("sd15", 4), ("sdxl", 1)):
        name = f"loss: {size}, bfloat16, batch {batch}"
        pixel_ms = value(f"{name}, pixel_lpips", "ms")
        latent_ms = value(f"{name}, e_latent_lpips", "ms")
        measured.append((f"{size} pixel LPIPS / E-LatentLPIPS", pixel_ms / latent_ms, ">=", 30.0))
    for recipe in ("sd15-lora-24gb", "sdxl-lora-24gb"):
        measured.append((f"{recipe}, GiB", value(f"recipe: {recipe}", "peak_gib"), "<=", 22.3))

    targets: dict[str, Metrics] = {}
    for name, number, relation, bound in measured:
        reached = number >= bound if relation == ">=" else number <= bound
        targets[name] = {
            "target": f"{relation} {bound}",
            "measured": None if math.isnan(number) else number,
            "reached": None if math.isnan(number) else reached,
        }
    return targets


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=330,
        help="the deadline of all rows, counted after the imports",
    )
    parser.add_argument("--out", type=Path, default=Path("work/gpu.json"), help="the result file")
    parser.add_argument("--pocket", action="store_true", help="at pocket size, on the CPU")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    on_gpu = torch.cuda.is_available() and not args.pocket
    if not on_gpu and not args.pocket:
        print("there is no CUDA GPU: the same rows at pocket size on the CPU, as with --pocket")

    hardware = torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}"
    print(f"{hardware} · torch {torch.__version__} · {args.seconds:.0f} s")
    result: Metrics = {"hardware": hardware, "torch": torch.__version__}
    run_rows(gpu_rows() if on_gpu else pocket_rows(), args.seconds, args.out, result)

    if on_gpu:
        result["targets"] = check_targets(result["rows"])
        write_json(args.out, result)
        for name, target in result["targets"].items():
            print(f"{name:44}{target['target']:>10}  {target['measured']}  {target['reached']}")


if __name__ == "__main__":
    main()
