"""A picture in one step against the teacher's 50 with guidance, decode included: the stock pipeline, random weights.

    python benchmarks/one_step.py --size sd15 --device cuda --precision float16

Bars, on one H100 at sd15, 512 px: one step ≤ 30 ms, ≥ 60 times faster than 50 steps with guidance. GPU: not measured.
Results go to stdout, and to `--out` where it is given.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
from real_sizes import SIZES, teacher_of

from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import System
from diffusion2gan.pipelines.timing import latencies, median_and_p90, peak_memory_bytes
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.teacher.one_step import one_step_scheduler

PROMPT = ["a blue star on sand"]


def faster(pipeline: Any, args: argparse.Namespace) -> None:
    if args.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if args.compile:
        pipeline.unet.compile()
        pipeline.vae.decoder.compile()


def measure(system: System, repeats: int) -> dict[str, float]:
    noise = noise_from_seeds([0], system.latent_shape)
    system.generate(PROMPT, noise)  # what compiles, compiles here
    median, p90 = median_and_p90(
        latencies(lambda: system.generate(PROMPT, noise), repeats, system.device)
    )
    peak = peak_memory_bytes(lambda: system.generate(PROMPT, noise), system.device)
    return {"ms": median * 1000, "p90_ms": p90 * 1000} | (
        {} if peak is None else {"peak_gib": peak / 2**30}
    )


def main() -> None:
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
    parser.add_argument("--out", type=Path, help="a JSON file; an entry is added to it")
    args = parser.parse_args()
    teacher = teacher_of(args.size, args.device)
    pipeline = teacher.pipeline.to(args.device, getattr(torch, args.precision))
    faster(pipeline, args)
    rows = {}
    for name, scheduler, steps, guidance in (
        ("one step", one_step_scheduler(teacher), 1, 0.0),
        (f"{args.steps} steps", teacher.scheduler, args.steps, args.guidance_scale),
    ):
        pipeline.scheduler = scheduler
        rows[name] = measure(System(name, pipeline, steps, guidance, "random"), args.repeats)
    one, many = rows.values()
    hardware = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}"
    )
    flags = [name for name in ("compile", "channels_last") if getattr(args, name)]
    name = ", ".join([args.size, args.device, args.precision, *flags])
    print(
        f"{name} · {hardware} · torch {torch.__version__}\n{'':12}{'ms':>10}{'p90':>10}{'peak GiB':>10}"
    )
    for row, found in rows.items():
        print(
            f"{row:12}{found['ms']:10.1f}{found['p90_ms']:10.1f}{found.get('peak_gib', float('nan')):10.2f}"
        )
    print(f"{many['ms'] / one['ms']:.1f} times faster")
    if args.out:
        entry = {
            "hardware": hardware,
            "torch": torch.__version__,
            "rows": rows,
            "times_faster": many["ms"] / one["ms"],
        }
        write_json(args.out, (read_json(args.out) if args.out.exists() else {}) | {name: entry})


if __name__ == "__main__":
    main()
