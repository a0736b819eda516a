"""Latency of an image in one step against the teacher's 50 steps with guidance, decoding included.

    python benchmarks/one_step.py --size sd15 --device cuda --precision float16

Both are the stock pipeline with random weights. Targets, on one H100 at sd15, 512 px: one step
≤ 30 ms, and ≥ 60 times faster than 50 steps with guidance. GPU: not measured. Results are printed,
and added to `--out` if it is given.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from real_sizes import SIZES, random_teacher

from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import System
from diffusion2gan.pipelines.timing import latencies, median_and_p90, peak_memory_bytes
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.teacher.one_step import one_step_scheduler

PROMPT = ["a blue star on sand"]


def apply_speed_options(pipeline: Any, args: argparse.Namespace) -> None:
    if args.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if args.compile:
        pipeline.unet.compile()
        pipeline.vae.decoder.compile()


def measure(system: System, repeats: int) -> dict[str, float]:
    noise = noise_from_seeds([0], system.latent_shape)

    def generate() -> None:
        system.generate(PROMPT, noise)

    generate()  # warm-up, and compilation
    median, p90 = median_and_p90(latencies(generate, repeats, system.device))
    row = {"ms": median * 1000, "p90_ms": p90 * 1000}

    peak = peak_memory_bytes(generate, system.device)
    if peak is not None:
        row["peak_gib"] = peak / 2**30
    return row


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """One step without guidance and the teacher's steps with it: {"rows", "times_faster"}."""
    teacher = random_teacher(args.size, args.device)
    pipeline = teacher.pipeline.to(args.device, getattr(torch, args.precision))
    apply_speed_options(pipeline, args)

    # One step
    pipeline.scheduler = one_step_scheduler(teacher)
    one_step = measure(System("one step", pipeline, 1, 0.0, "random"), args.repeats)

    # The teacher's steps
    many_name = f"{args.steps} steps"
    pipeline.scheduler = teacher.scheduler
    system = System(many_name, pipeline, args.steps, args.guidance_scale, "random")
    many_steps = measure(system, args.repeats)

    rows = {"one step": one_step, many_name: many_steps}
    return {"rows": rows, "times_faster": many_steps["ms"] / one_step["ms"]}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="pocket", choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "float16", "bfloat16")
    )
    parser.add_argument("--steps", type=int, default=50, help="of the teacher")
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file to which the entry is added")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    result = compare(args)

    # Report
    if args.device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"CPU {platform.machine()}"
    flags = [name for name in ("compile", "channels_last") if getattr(args, name)]
    name = ", ".join([args.size, args.device, args.precision, *flags])
    print(f"{name} · {hardware} · torch {torch.__version__}")
    print(f"{'':12}{'ms':>10}{'p90':>10}{'peak GiB':>10}")
    for label, row in result["rows"].items():
        peak_gib = row.get("peak_gib", float("nan"))
        print(f"{label:12}{row['ms']:10.1f}{row['p90_ms']:10.1f}{peak_gib:10.2f}")
    print(f"{result['times_faster']:.1f} times faster")

    if args.out:
        entries = read_json(args.out) if args.out.exists() else {}
        entries[name] = {"hardware": hardware, "torch": torch.__version__, **result}
        write_json(args.out, entries)


if __name__ == "__main__":
    main()
