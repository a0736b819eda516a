"""Which features distinguish blurred from sharp images: Fréchet distances of degraded renderings.

    python benchmarks/feature_spaces.py --count 512

Both halves are real renderings of different captions; the second half is blurred (Gaussian,
standard deviation in pixels) or given noise (standard deviation in units of [−1, 1]). Each row is
divided by the distance of the unchanged halves. Writes docs/results/feature_spaces.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from diffusion2gan.evaluate.features import PocketClip, load_probe, probe_features
from diffusion2gan.evaluate.metrics import frechet_distance
from diffusion2gan.evaluate.pocket import real_images
from diffusion2gan.runtime.files import write_json

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "feature_spaces.json"
Images = NDArray[np.uint8]


def blur(images: Images, radius: float) -> Images:
    blurred = []
    for image in images:
        filtered = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))
        blurred.append(np.asarray(filtered))
    return np.stack(blurred)


def add_noise(images: Images, std: float) -> Images:
    noise = np.random.default_rng(0).normal(0, std * 127.5, images.shape)
    return np.asarray((images + noise).round().clip(0, 255), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=512)
    args = parser.parse_args()

    # Two halves of other captions; the second one degraded
    first = real_images(args.count, 101)
    second = real_images(args.count, 102)
    degraded = {"untouched": second, "noise 0.05": add_noise(second, 0.05)}
    for radius in (0.5, 0.8, 1.2, 2.0):
        degraded[f"blur {radius}"] = blur(second, radius)

    # Distances in both feature spaces, and their ratios to the distance of the unchanged halves
    clip, probe = PocketClip(), load_probe()
    spaces = {
        "clip": lambda images: clip.encode_images(images).image_embeds,
        "probe": lambda images: probe_features(probe, images),
    }
    distances: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for space, features in spaces.items():
        reference = features(first)
        row = {}
        for name, images in degraded.items():
            row[name] = frechet_distance(features(images), reference)
        distances[space] = row
        ratios[space] = {name: distance / row["untouched"] for name, distance in row.items()}

    result = {
        "command": f"python benchmarks/feature_spaces.py --count {args.count}",
        "threads": torch.get_num_threads(),
        "distances": distances,
        "ratios": ratios,
    }
    write_json(RESULTS, result)
    for name in degraded:
        print(f"{name:12}", *(f"{space} ×{row[name]:.2f}" for space, row in ratios.items()))


if __name__ == "__main__":
    main()
