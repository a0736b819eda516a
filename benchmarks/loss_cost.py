"""The cost of the loss in a training step: forward and backward time (median) and peak memory.

    python benchmarks/loss_cost.py --size sd15 --device cuda

Random weights at real sizes: `pocket` (4×16×16 latents of 64 px), `sd15` (4×64×64 of 512 px),
`sdxl` (4×128×128 of 1024 px). Rows: MSE, LPIPS on decoded pixels, LatentLPIPS, E-LatentLPIPS, and
the random transform T alone (drawn, and applied to both inputs).

Each row runs in a process of its own. Peak memory is above what the process held with its inputs
and weights: on a CPU from the resident set's high-water mark, on CUDA from the allocator. Writes
docs/results/loss_cost.json, one entry per size and device; other entries stay.
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
from collections.abc import Callable, Sequence
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

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "loss_cost.json"
ROWS = ("mse", "pixel_lpips", "latent_lpips", "e_latent_lpips", "T alone")
TRANSFORMS = ("geometric", "cutout")
LATENT_SIDES = {"pocket": 16, "sd15": 64, "sdxl": 128}

# Stable Diffusion 1.5's VAE. SDXL's differs only in sample_size and scaling_factor.
SD_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


def build_vae(size: str) -> AutoencoderKL:
    if size == "pocket":
        return models.vae()
    if size == "sd15":
        return AutoencoderKL(**SD_VAE, sample_size=512, scaling_factor=0.18215)
    return AutoencoderKL(**SD_VAE, sample_size=1024, scaling_factor=0.13025)


def build_network(size: str, in_channels: int, num_dropped: int) -> tuple[VGG, list[Tensor]]:
    """A feature network without `num_dropped` of its pools, and its heads."""
    widths = models.latent_vgg().config["widths"] if size == "pocket" else WIDTHS
    heads = [torch.ones(width) for width in widths]
    return VGG(in_channels, tuple(widths), num_dropped), heads


def build_loss(
    row: str, size: str, device: str, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor]:
    """(a, b) → [B]. T alone returns a sum, so that it has a gradient."""
    spatial_factor = 4 if size == "pocket" else 8
    latent_network = build_network(size, 4, num_dropped_pools(spatial_factor))
    match row:
        case "mse":
            return mse
        case "pixel_lpips":
            pixel_network = build_network(size, 3, 0)
            return PixelLPIPS(*pixel_network, build_vae(size)).to(device, dtype)
        case "latent_lpips":
            return LatentLPIPS(*latent_network).to(device, dtype)
        case "e_latent_lpips":
            transforms = "+".join(TRANSFORMS)
            return ELatentLPIPS(*latent_network, transforms=transforms).to(device, dtype)

    def transform_alone(a: Tensor, b: Tensor) -> Tensor:
        transform = draw_transform(len(a), TRANSFORMS, device=device)
        return (apply_transform(a, transform) - apply_transform(b, transform)).sum((1, 2, 3))

    return transform_alone


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """The high-water mark of memory so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(row: str, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds (median of `repeats`, after a warm-up) and MiB above the weights and inputs."""
    # Loss and inputs
    torch.manual_seed(0)
    side = LATENT_SIDES[args.size]
    loss = build_loss(row, args.size, args.device, getattr(torch, args.dtype))
    if args.compile:
        loss = torch.compile(loss)
    a, b = torch.randn(2, args.batch, 4, side, side, device=args.device)
    a.requires_grad_()

    # Memory before
    synchronize(args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    baseline = peak_bytes(args.device)

    # Forward and backward; the first one is the warm-up
    times = []
    for _ in range(args.repeats + 1):
        a.grad = None
        start = time.perf_counter()
        loss(a, b).sum().backward()
        synchronize(args.device)
        times.append(time.perf_counter() - start)

    peak_mib = (peak_bytes(args.device) - baseline) / 2**20
    return {"ms": statistics.median(times[1:]) * 1000, "peak_mib": peak_mib}


def measure_in_new_process(row: str) -> dict[str, Any]:
    """`measure` with these options in a new process; {"failed": reason} if it fails."""
    done = subprocess.run([sys.executable, *sys.argv, "--row", row], capture_output=True, text=True)
    if done.returncode != 0:
        error_lines = done.stderr.strip().splitlines()
        return {"failed": error_lines[-1] if error_lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(title)
    print(f"{'loss':16}{'ms':>10}{'MiB':>10}{'× pixel':>10}")
    pixel_ms = rows["pixel_lpips"].get("ms", math.nan)
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:16}failed: {row['failed']}")
        else:
            print(f"{name:16}{row['ms']:10.2f}{row['peak_mib']:10.1f}{pixel_ms / row['ms']:10.1f}")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="pocket", choices=LATENT_SIDES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the networks"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="a JSON file to which the entry is added"
    )
    parser.add_argument("--row", choices=ROWS, help="measure this row and print a line of JSON")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args)))
        return

    rows = {row: measure_in_new_process(row) for row in ROWS}

    if args.device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"CPU {platform.machine()}"
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
    name = f"{args.size}, {args.device}, {args.dtype}"
    if args.compile:
        name += ", compiled"
    result = read_json(args.out) if args.out.exists() else {}
    result[name] = entry
    write_json(args.out, result)
    print_table(f"{name} · {hardware} · batch {args.batch}", rows)


if __name__ == "__main__":
    main()
