"""One training step at real sizes, random weights: images/s, seconds (median) and peak memory of each row.

    python benchmarks/train_step.py --size sd15 --device cuda --precision bfloat16 --batch 32
    python benchmarks/train_step.py --size sd15 --device cuda --recipe sd15-lora-24gb

Rows: the losses alone; with the discriminator, without and with the penalty R1 in every step; a LoRA student; the same
with Adam's averages in 8 bits. `--recipe` measures a shipped recipe instead, by two of its batch's parts: its memory.
Each row runs in a process of its own. Bars, on one H100 at sd15: mse ≥ 138.4 images/s (the paper's), e_latent_lpips at
85 % of our mse or more. GPU: not measured. Results go to stdout, and to `--out` where it is given.
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
from pathlib import Path
from typing import Any

import torch
from real_sizes import SIZES, teacher_of

from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.optimizer import BETAS
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.store import Pairs
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG, WIDTHS, num_dropped_pools
from diffusion2gan.pipelines.timing import peak_memory_bytes
from diffusion2gan.recipe import Recipe, load_recipe
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.teacher.pipeline import Teacher

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
    "with_d_and_r1": GAN | {"r1_weight": 1e-4, "r1_every": 1},
    "lora": LORA,
    "lora_adamw8bit": LORA | {"optimizer": "adamw8bit"},
}


def recipe_of(row: str, args: argparse.Namespace, network: Path) -> Recipe:
    if args.recipe:
        values = load_recipe(args.recipe).model_dump()
        parts = min(
            2, values["gradient_accumulation_steps"]
        )  # more parts of the same size take longer and no more memory
        values |= {
            "batch_size": values["batch_size"] // values["gradient_accumulation_steps"] * parts,
            "gradient_accumulation_steps": parts,
        }
        values |= {"device": args.device, "precision": args.precision, "perceptual": str(network)}
        return Recipe.model_validate(values | {"gan_start_pairs": 0, "discriminator_warmup": 0})
    common = {
        "perceptual": str(network),
        "batch_size": args.batch,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "device": args.device,
        "precision": args.precision,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    return Recipe.model_validate(common | ROWS[row])


def write_network(teacher: Teacher, size: str, folder: Path) -> None:
    """A random perceptual network for these latents: the paper's widths, the pocket's for the pocket."""
    widths = tuple(width // 8 for width in WIDTHS) if size == "pocket" else WIDTHS
    vgg = VGG(teacher.latent_shape[0], widths, num_dropped_pools(teacher.spatial_factor))
    LatentLPIPS(vgg, [torch.ones(width) for width in widths]).save_pretrained(folder)


def faster(run: Run, args: argparse.Namespace) -> None:
    """The flags. D is not compiled: R1 differentiates twice, which compiled graphs cannot."""
    if args.channels_last:
        run.student.network.to(memory_format=torch.channels_last)
    if args.fused and run.recipe.optimizer == "adamw":
        parameters = run.student.trained.parameters()
        run.optimizer = torch.optim.AdamW(
            parameters, lr=run.recipe.learning_rate, betas=BETAS, fused=True
        )
    if args.compile:
        run.student.network.compile()


def measure(row: str, args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        teacher = teacher_of(args.size, args.device)
        write_network(teacher, args.size, Path(folder))
        recipe = recipe_of(row, args, Path(folder))
        run, distance = Run(recipe, teacher), build_distance(recipe, teacher.device, teacher)
    teacher.offload(network=not recipe.needs_teacher, vae=True)
    faster(run, args)
    count = recipe.batch_size
    latents = torch.randn(count, *teacher.latent_shape)
    pairs = Pairs(list(range(count)), list(range(count)), ["a blue star on sand"] * count, latents)
    times = []
    for _ in range(args.repeats + 2):
        start = time.perf_counter()
        step(
            run, pairs, distance
        )  # reads the gradient's norm on the host: waits for the GPU by itself
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    peak = peak_memory_bytes(lambda: step(run, pairs, distance), args.device)
    told = {
        "batch": count,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "first_step_s": times[0],
    }
    return told | ({} if peak is None else {"peak_gib": peak / 2**30})


def in_a_fresh_process(row: str) -> dict[str, Any]:
    """`measure` of this command line in a process of its own; what went wrong in words, such as too little memory."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--row", row], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
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
    parser.add_argument("--fused", action="store_true", help="one kernel for the student's AdamW")
    parser.add_argument("--out", type=Path, help="a JSON file; an entry is added to it")
    parser.add_argument("--row", help="this row alone, as one line of JSON")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args)))
        return
    hardware = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}"
    )
    flags = [
        name
        for name in ("gradient_checkpointing", "compile", "channels_last", "fused")
        if getattr(args, name)
    ]
    name = ", ".join([args.size, args.device, args.precision, *flags])
    print(f"{name} · {hardware} · torch {torch.__version__}")
    print(f"{'row':18}{'batch':>7}{'s/step':>10}{'images/s':>10}{'peak GiB':>10}")
    rows = {}
    for row in [args.recipe] if args.recipe else args.rows:
        rows[row] = found = in_a_fresh_process(row)
        if "failed" in found:
            print(f"{row:18}{found['failed']}", flush=True)
            continue
        print(
            f"{row:18}{found['batch']:7d}{found['seconds']:10.3f}{found['images_per_second']:10.1f}",
            end="",
        )
        print(f"{found.get('peak_gib', float('nan')):10.2f}", flush=True)
    if args.out:
        entry = {
            "hardware": hardware,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        result = read_json(args.out) if args.out.exists() else {}
        kept = result.get(name, {}).get("rows", {})
        write_json(args.out, result | {name: entry | {"rows": kept | rows}})


if __name__ == "__main__":
    main()
