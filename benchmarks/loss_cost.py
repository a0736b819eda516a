"""What a training step pays for its loss alone: forward and backward, ms (median) and peak memory.

    python benchmarks/loss_cost.py --size sd15 --device cuda

Random weights at real sizes: `pocket` (4×16×16 latents of 64 px), `sd15` (4×64×64 of 512 px), `sdxl` (4×128×128 of
1024 px). Rows: MSE, LPIPS on decoded pixels, LatentLPIPS, E-LatentLPIPS, and T alone (drawn and applied to both sides).
Each row runs in a process of its own. Peak memory is above what the process held with its inputs and weights: on a CPU
from the resident set's high-water mark, on CUDA the allocator's. Writes docs/results/loss_cost.json, one entry a size
and device; rows of other sizes stay.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffusion2gan.distill.losses import mse
from diffusion2gan.perceptual.augment import apply_transform, draw_transform
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.perceptual.vgg import VGG, WIDTHS, num_dropped_pools
from diffusion2gan.pocket import models
from diffusion2gan.runtime.files import read_json, write_json

PATH = Path(__file__).parent.parent / "docs" / "results" / "loss_cost.json"
ROWS = ("mse", "pixel_lpips", "latent_lpips", "e_latent_lpips", "T alone")
FAMILIES = ("geometric", "cutout")
SIDES = {"pocket": 16, "sd15": 64, "sdxl": 128}  # of the latents
BIG_VAE: dict[
    str, Any
] = {  # Stable Diffusion 1.5's; SDXL's differs in sample_size and scaling_factor alone
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


def vae_of(size: str) -> AutoencoderKL:
    match size:
        case "pocket":
            return models.vae()
        case "sd15":
            return AutoencoderKL(**BIG_VAE, sample_size=512, scaling_factor=0.18215)
        case _:
            return AutoencoderKL(**BIG_VAE, sample_size=1024, scaling_factor=0.13025)


def network_of(size: str, channels: int, num_dropped: int) -> tuple[VGG, list[Tensor]]:
    widths = models.latent_vgg().config["widths"] if size == "pocket" else WIDTHS
    return VGG(channels, tuple(widths), num_dropped), [torch.ones(width) for width in widths]


def loss_of(
    row: str, size: str, device: str, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor]:
    """(a, b) → [B]; T alone answers a sum of what it made."""
    latent = network_of(size, 4, num_dropped_pools(4 if size == "pocket" else 8))
    match row:
        case "mse":
            return mse
        case "pixel_lpips":
            return PixelLPIPS(*network_of(size, 3, 0), vae_of(size)).to(device, dtype)
        case "latent_lpips":
            return LatentLPIPS(*latent).to(device, dtype)
        case "e_latent_lpips":
            return ELatentLPIPS(*latent, transforms="+".join(FAMILIES)).to(device, dtype)

    def transform_alone(a: Tensor, b: Tensor) -> Tensor:
        drawn = draw_transform(len(a), FAMILIES, device=device)
        return (apply_transform(a, drawn) - apply_transform(b, drawn)).sum((1, 2, 3))

    return transform_alone


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """High-water mark so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(row: str, args: argparse.Namespace) -> dict[str, float]:
    """ms (median of `repeats`, after one warm-up) and MiB above the weights and inputs."""
    torch.manual_seed(0)
    side = SIDES[args.size]
    loss = loss_of(row, args.size, args.device, getattr(torch, args.dtype))
    if args.compile:
        loss = torch.compile(loss)
    a, b = torch.randn(2, args.batch, 4, side, side, device=args.device)
    a.requires_grad_()
    wait(args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    baseline, times = peak_bytes(args.device), []
    for _ in range(args.repeats + 1):
        a.grad = None
        start = time.perf_counter()
        loss(a, b).sum().backward()
        wait(args.device)
        times.append(time.perf_counter() - start)
    mib = (peak_bytes(args.device) - baseline) / 2**20
    return {"ms": statistics.median(times[1:]) * 1000, "peak_mib": mib}


def in_a_fresh_process(row: str) -> dict[str, Any]:
    """`measure` of this command line, in a process that has run nothing else; {"failed": why} where that ends badly."""
    done = subprocess.run([sys.executable, *sys.argv, "--row", row], capture_output=True, text=True)
    if done.returncode != 0:
        told = done.stderr.strip().splitlines()
        return {"failed": told[-1] if told else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="pocket", choices=SIDES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the networks"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=PATH, help="a JSON file; an entry is added to it"
    )
    parser.add_argument("--row", choices=ROWS, help="this row alone, as one line of JSON")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args)))
        return
    rows = {row: in_a_fresh_process(row) for row in ROWS}
    hardware = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {platform.machine()}"
    )
    entry = {
        "command": shlex.join(["python", "benchmarks/loss_cost.py", *sys.argv[1:]]),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "batch": args.batch,
        "repeats": args.repeats,
        "compile": args.compile,
        "rows": rows,
    }
    result = read_json(args.out) if args.out.exists() else {}
    name = f"{args.size}, {args.device}, {args.dtype}" + (", compiled" if args.compile else "")
    write_json(args.out, result | {name: entry})
    print(
        f"{name} · {hardware} · batch {args.batch}\n{'loss':16}{'ms':>10}{'MiB':>10}{'× pixel':>10}"
    )
    for row, found in rows.items():
        if "failed" in found:
            print(f"{row:16}failed: {found['failed']}")
            continue
        times = rows["pixel_lpips"].get("ms", math.nan) / found["ms"]
        print(f"{row:16}{found['ms']:10.2f}{found['peak_mib']:10.1f}{times:10.1f}")


if __name__ == "__main__":
    main()
