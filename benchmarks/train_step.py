"""A training step at real sizes with random weights: images/s, seconds (median) and peak memory.

    python benchmarks/train_step.py --size sd15 --device cuda --precision bfloat16 --batch 32
    python benchmarks/train_step.py --size sd15 --device cuda --recipe sd15-lora-24gb

Rows: the losses alone; with the discriminator, without and with the R1 penalty in every step; a
LoRA student; the same with 8-bit Adam. `--recipe` measures the memory of a shipped recipe instead,
with two of its micro-batches.

Each row runs in a process of its own. Targets, on one H100 at sd15: mse ≥ 138.4 images/s (the
paper's), e_latent_lpips ≥ 85 % of our mse. GPU: not measured. Results are printed, and added to
`--out` if it is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from real_sizes import SIZES, random_teacher

from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.store import Pairs
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG, WIDTHS, num_dropped_pools
from diffusion2gan.pipelines.timing import peak_memory_bytes
from diffusion2gan.recipe import Recipe, load_recipe
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.prompt_cache import PromptCache

PROMPT = "a blue star on sand"
NUM_WARMUP_STEPS = 2
GAN: dict[str, Any] = {
    "loss": "e_latent_lpips",
    "adversarial_weight": 0.1,
    "discriminator_warmup": 0,
    "r1_weight": 0.0,
}
LORA: dict[str, Any] = {"loss": "e_latent_lpips", "lora_rank": 64}
ROWS: dict[str, dict[str, Any]] = {
    "mse": {"loss": "mse"},
    "e_latent_lpips": {"loss": "e_latent_lpips"},
    "teacher_features": {"loss": "e_latent_lpips", "perceptual": "teacher"},
    "with_d": GAN,
    "with_d_and_r1": {**GAN, "r1_weight": 1e-4, "r1_every": 1},
    "lora": LORA,
    "lora_adamw8bit": {**LORA, "optimizer": "adamw8bit"},
}


def build_recipe(row: str, args: argparse.Namespace, network: Path) -> Recipe:
    if not args.recipe:
        values = {
            "perceptual": str(network),
            "batch_size": args.batch,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "device": args.device,
            "precision": args.precision,
            "gradient_checkpointing": args.gradient_checkpointing,
        }
        values.update(ROWS[row])
        return Recipe.model_validate(values)

    # A shipped recipe, reduced to two of its micro-batches: more of the same size take longer, but
    # no more memory.
    values = load_recipe(args.recipe).model_dump()
    micro_batch_size = values["batch_size"] // values["gradient_accumulation_steps"]
    num_micro_batches = min(2, values["gradient_accumulation_steps"])
    values["batch_size"] = micro_batch_size * num_micro_batches
    values["gradient_accumulation_steps"] = num_micro_batches
    values["device"] = args.device
    values["precision"] = args.precision
    values["perceptual"] = str(network)

    # The discriminator trains from the first step.
    values["gan_start_pairs"] = 0
    values["discriminator_warmup"] = 0
    return Recipe.model_validate(values)


def write_network(teacher: Teacher, size: str, folder: Path) -> None:
    """A random perceptual network for the teacher's latents.

    Its widths are the paper's; for the pocket teacher an eighth of them.
    """
    widths = tuple(width // 8 for width in WIDTHS) if size == "pocket" else WIDTHS
    vgg = VGG(teacher.latent_shape[0], widths, num_dropped_pools(teacher.spatial_factor))
    LatentLPIPS(vgg, [torch.ones(width) for width in widths]).save_pretrained(folder)


def apply_speed_options(run: Run, args: argparse.Namespace) -> None:
    """D is not compiled: R1 differentiates twice, which compiled graphs do not support."""
    if args.channels_last:
        run.student.network.to(memory_format=torch.channels_last)
    if args.compile:
        run.student.network.compile()


def measure(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Images/s, seconds per step and, if the system reports it, peak memory of one row."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_in_folder(row, args, Path(folder))


def measure_in_folder(row: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """`measure`, with the perceptual network and the kept prompts in `folder`."""
    # Teacher, student and loss
    teacher = random_teacher(args.size, args.device)
    write_network(teacher, args.size, folder / "network")
    recipe = build_recipe(row, args, folder / "network")
    run = Run(recipe, teacher)
    distance = build_distance(recipe, teacher.device, teacher)
    apply_speed_options(run, args)

    # What training does not use is not in memory, as in `distill`
    teacher.offload(network=not recipe.needs_teacher, vae=True)
    if recipe.prompt_embeds == "kept":
        teacher.cache_prompts(PromptCache(folder / "prompts", [PROMPT], teacher.encode))

    # A batch of random pairs
    batch_size = recipe.batch_size
    pairs = Pairs(
        list(range(batch_size)),
        list(range(batch_size)),
        [PROMPT] * batch_size,
        torch.randn(batch_size, *teacher.latent_shape),
    )

    # Training steps. As in `distill`, the host waits for the numbers of the step before.
    start = time.perf_counter()
    metrics, _ = step(run, pairs, distance)
    metrics.read()
    first_step_s = time.perf_counter() - start
    times = []
    for _ in range(args.repeats + NUM_WARMUP_STEPS):
        start = time.perf_counter()
        next_metrics, _ = step(run, pairs, distance)
        metrics.read()
        metrics = next_metrics
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[NUM_WARMUP_STEPS:])

    result = {
        "batch": batch_size,
        "seconds": seconds,
        "images_per_second": batch_size / seconds,
        "first_step_s": first_step_s,
    }

    # Peak memory of the largest step: at the start of a run R1 is due, if the recipe has it
    run.pairs_seen = 0
    peak = peak_memory_bytes(lambda: step(run, pairs, distance), args.device)
    if peak is not None:
        result["peak_gib"] = peak / 2**30
    return result


def measure_in_new_process(row: str) -> dict[str, Any]:
    """`measure` with these options in a new process.

    {"failed": reason} if it fails, for example for lack of memory.
    """
    done = subprocess.run([sys.executable, *sys.argv, "--row", row], capture_output=True, text=True)
    if done.returncode != 0:
        error_lines = done.stderr.strip().splitlines()
        reason = error_lines[-1][:300] if error_lines else f"exit code {done.returncode}"
        return {"failed": reason}
    return json.loads(done.stdout.splitlines()[-1])


def print_row(name: str, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{name:18}{row['failed']}", flush=True)
        return
    peak_gib = row.get("peak_gib", float("nan"))
    print(
        f"{name:18}{row['batch']:7d}{row['seconds']:10.3f}{row['images_per_second']:10.1f}"
        f"{peak_gib:10.2f}",
        flush=True,
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="pocket", choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--rows", nargs="+", default=["mse", "e_latent_lpips", "with_d"], choices=list(ROWS)
    )
    parser.add_argument("--recipe", help="a shipped recipe instead of the rows")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file to which the entry is added")
    parser.add_argument("--row", help="measure this row and print a line of JSON")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args)))
        return

    # Name of the entry: size, device, precision and the options that are on
    if args.device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"CPU {platform.machine()}"
    options = ("gradient_checkpointing", "compile", "channels_last")
    flags = [option for option in options if getattr(args, option)]
    name = ", ".join([args.size, args.device, args.precision, *flags])

    print(f"{name} · {hardware} · torch {torch.__version__}")
    print(f"{'row':18}{'batch':>7}{'s/step':>10}{'images/s':>10}{'peak GiB':>10}")
    rows = {}
    for row in [args.recipe] if args.recipe else args.rows:
        rows[row] = measure_in_new_process(row)
        print_row(row, rows[row])

    if args.out:
        result = read_json(args.out) if args.out.exists() else {}
        existing_rows = result.get(name, {}).get("rows", {})
        result[name] = {
            "hardware": hardware,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rows": {**existing_rows, **rows},
        }
        write_json(args.out, result)


if __name__ == "__main__":
    main()
