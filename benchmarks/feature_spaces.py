"""Which features tell a blurred picture from a sharp one: Fréchet distances of real pictures, made worse in known ways.

    python benchmarks/feature_spaces.py --count 512

Both halves are real renderings of other captions; the second is blurred (Gaussian, standard deviation in pixels) or
given noise (standard deviation in units of [−1, 1]). Each row is divided by the distance of the untouched halves.
Writes docs/results/feature_spaces.json.
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
from diffusion2gan.evaluate.run import real_pictures
from diffusion2gan.runtime.files import write_json

Pictures = NDArray[np.uint8]


def blurred(pictures: Pictures, radius: float) -> Pictures:
    return np.stack(
        [np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius))) for p in pictures]
    )


def noisy(pictures: Pictures, std: float) -> Pictures:
    noise = np.random.default_rng(0).normal(0, std * 127.5, pictures.shape)
    return np.asarray((pictures + noise).round().clip(0, 255), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=512)
    args = parser.parse_args()
    first, second = real_pictures(args.count, 101), real_pictures(args.count, 102)
    clip, probe = PocketClip(), load_probe()
    spaces = {
        "clip": lambda x: clip.images(x).image_embeds,
        "probe": lambda x: probe_features(probe, x),
    }
    worse = {"untouched": second, "noise 0.05": noisy(second, 0.05)}
    worse |= {f"blur {radius}": blurred(second, radius) for radius in (0.5, 0.8, 1.2, 2.0)}
    rows: dict[str, dict[str, float]] = {}
    for space, features in spaces.items():
        reference = features(first)
        rows[space] = {
            name: frechet_distance(features(pictures), reference)
            for name, pictures in worse.items()
        }
    ratios = {s: {name: d / row["untouched"] for name, d in row.items()} for s, row in rows.items()}
    command = f"python benchmarks/feature_spaces.py --count {args.count}"
    path = Path(__file__).parent.parent / "docs" / "results" / "feature_spaces.json"
    write_json(
        path,
        {
            "command": command,
            "threads": torch.get_num_threads(),
            "distances": rows,
            "ratios": ratios,
        },
    )
    for name in worse:
        print(f"{name:12}", *(f"{space} ×{row[name]:.2f}" for space, row in ratios.items()))


if __name__ == "__main__":
    main()
