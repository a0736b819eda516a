"""How much of latents the random transforms keep, by frequency, for each way of resampling.

    python benchmarks/resampling.py

Each row moves latents by random maps of the family `geometric`. The reference is an implementation
of its own, by SciPy: ×2 upsampling by zeros and the sym6 filter, bilinear sampling, sym6 again, in
the manner of StyleGAN2-ADA (Karras et al. 2020, appendix B.2). Also: the share of the distance of
a latent to itself plus a wave that E-LatentLPIPS has beside LatentLPIPS, and the time of a
transform. Writes docs/results/resampling.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.pairs.store import open_set, read_shard
from diffusion2gan.perceptual.augment import draw_transform, resample
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS
from diffusion2gan.recipe import ResamplingName
from diffusion2gan.runtime.files import write_json

OUT = Path(__file__).parent.parent / "docs" / "results" / "resampling.json"
BANDS = np.arange(0, 0.5, 0.05)  # lower ends, in cycles per latent pixel
FINE = 0.25  # fine energy is that of frequencies from here on
WAVES = (0.125, 0.25, 0.3125, 0.375, 0.4375)
REFERENCE = "reference: sym6"

# The low-pass filter of the wavelet sym6 (Daubechies 1992, table 6.3), with a sum of √2
SYM6 = np.array(
    [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ]
)


def reference(x: Tensor, matrix: Tensor) -> Tensor:
    """`augment.resample` with "oversampled", by another filter and another library. CPU only."""
    size = x.shape[-1]
    moved = np.zeros(x.shape)
    for sample, affine in enumerate(matrix.double().numpy()):
        for channel in range(x.shape[1]):
            plane = x[sample, channel].double().numpy()
            moved[sample, channel] = reference_plane(plane, affine, size)
    return torch.from_numpy(moved).float()


def reference_plane(plane: NDArray[Any], affine: NDArray[Any], size: int) -> NDArray[Any]:
    """One channel [size, size] moved by `affine` [2, 3]."""
    up_filter = SYM6 * math.sqrt(2)  # its sum is 2: zeros stand between the pixels
    down_filter = SYM6[::-1] / math.sqrt(2)
    delay = (len(SYM6) - 1) / 2

    # Upsample. Pixel k of the padded plane is at 2k + delay of the result.
    pad = size
    padded = np.pad(plane, pad, mode="symmetric")
    up = signal.upfirdn(up_filter, signal.upfirdn(up_filter, padded, up=2, axis=0), up=2, axis=1)

    # Sample, with a margin for the second filter
    margin = len(SYM6)
    coordinate = (np.arange(-margin, 2 * size + margin) + 0.5) / size - 1
    x, y = np.meshgrid(coordinate, coordinate)
    source_x = affine[0, 0] * x + affine[0, 1] * y + affine[0, 2]
    source_y = affine[1, 0] * x + affine[1, 1] * y + affine[1, 2]
    positions = []
    for source in (source_y, source_x):
        pixel = (source + 1) * size / 2 - 0.5
        positions.append(2 * (pixel + pad) + delay)
    sampled = ndimage.map_coordinates(up, positions, order=1, mode="nearest")

    # Downsample. Output pixel i is centred between the samples 2i and 2i + 1.
    filtered = signal.upfirdn(down_filter, signal.upfirdn(down_filter, sampled, axis=0), axis=1)
    kept = 2 * np.arange(size) + math.ceil(delay) + margin
    return filtered[np.ix_(kept, kept)]


def resamplers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """(x, matrix) → moved x, by name."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for name in get_args(ResamplingName):
        found[name] = partial(resample, resampling=name)
    found[REFERENCE] = reference
    return found


def measure_spectrum(
    move: Callable[[Tensor, Tensor], Tensor], x: Tensor, matrix: Tensor
) -> dict[str, Any]:
    """The energy that is left of `x`: of all, of the fine, and the amplitude by frequency band."""
    size = x.shape[-1]
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    before = torch.fft.fft2(x).abs().square().mean((0, 1))
    after = torch.fft.fft2(move(x, matrix)).abs().square().mean((0, 1))

    amplitudes = []
    for low in BANDS:
        band = (radius >= low) & (radius < low + 0.05)
        amplitudes.append(float((after[band].sum() / before[band].sum()).sqrt()))
    fine = radius >= FINE
    return {
        "energy": float(after.sum() / before.sum()),
        "fine_energy": float(after[fine].sum() / before[fine].sum()),
        "amplitudes": amplitudes,
    }


def wave(size: int, cycles_per_pixel: float, direction: float) -> Tensor:
    """[size, size], a plane wave of amplitude 1."""
    x = torch.arange(size, dtype=torch.float32)
    phase = math.cos(direction) * x[None, :] + math.sin(direction) * x[:, None]
    return (2 * math.pi * cycles_per_pixel * phase).sin()


@torch.no_grad()
def measure_response(distance: LatentLPIPS, x: Tensor, amplitude: float) -> dict[str, float]:
    """The mean distance of latents to themselves plus a wave of random direction."""
    responses = {}
    for cycles in WAVES:
        generator = torch.Generator().manual_seed(0)
        directions = 2 * math.pi * torch.rand(len(x), generator=generator)
        waves = torch.stack([wave(x.shape[-1], cycles, float(angle)) for angle in directions])
        disturbed = x + amplitude * waves[:, None]
        responses[str(cycles)] = float(distance(disturbed, x, generator).mean())
    return responses


def measure_ms(move: Callable[[Tensor, Tensor], Tensor], side: int, repeats: int = 20) -> float:
    """The median time of moving one latent [1, 4, side, side], forward and backward."""
    x = torch.randn(1, 4, side, side, requires_grad=True)
    matrix = draw_transform(1, ("geometric",), torch.Generator().manual_seed(0)).matrix
    assert matrix is not None
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        move(x, matrix).sum().backward()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def pocket_latents(count: int) -> Tensor:
    folder = assets.folder("pairs")
    spec = open_set(folder)
    num_shards = -(-count // spec.shard_size)
    shards = [read_shard(folder, shard, spec=spec).latents for shard in range(num_shards)]
    return torch.cat(shards)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=256, help="latents per set")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    # Spectra
    generator = torch.Generator().manual_seed(0)
    matrix = draw_transform(args.count, ("geometric",), generator).matrix
    assert matrix is not None
    sets = {
        "white, 64×64": torch.randn(args.count, 1, 64, 64, generator=generator),
        "white, 16×16": torch.randn(args.count, 4, 16, 16, generator=generator),
        "pocket latents, 16×16": pocket_latents(args.count),
    }
    result: dict[str, Any] = {
        "command": f"python benchmarks/resampling.py --count {args.count}",
        "gpu": "not measured",
        "transforms": "geometric",
        "bands": [f"{low:.2f}-{low + 0.05:.2f}" for low in BANDS],
        "fine": f"from {FINE} cycles per latent pixel on",
        "spectra": {},
    }
    for set_name, x in sets.items():
        rows = {name: measure_spectrum(move, x, matrix) for name, move in resamplers().items()}
        result["spectra"][set_name] = rows
        for name, row in rows.items():
            print(f"{set_name:22} {name:16} fine energy {row['fine_energy']:.3f}", flush=True)

    # Response of the distance to waves, relative to the distance without transforms
    x = sets["pocket latents, 16×16"]
    plain = measure_response(LatentLPIPS.from_pretrained(), x, 0.2)
    result["response"] = {}
    for name in get_args(ResamplingName):
        distance = ELatentLPIPS.from_pretrained(transforms="geometric", resampling=name)
        response = measure_response(distance, x, 0.2)
        result["response"][name] = {key: response[key] / plain[key] for key in response}
        print(name, {key: round(value, 3) for key, value in result["response"][name].items()})

    # Time
    result["threads"] = torch.get_num_threads()
    result["ms"] = {}
    for name in get_args(ResamplingName):
        move = resamplers()[name]
        result["ms"][name] = {f"{side}×{side}": measure_ms(move, side) for side in (16, 64, 128)}
        print(name, result["ms"][name])
    write_json(args.out, result)


if __name__ == "__main__":
    main()
