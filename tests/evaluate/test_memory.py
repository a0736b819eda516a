"""The memory of `evaluate` does not grow with the number of images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion2gan.evaluate.images import CHUNK, ImageSet
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime import checkpoint

COUNTS = (64, 320)
# Of an image 4 KiB of features and answers are kept; temporary tables of all pairs of images add
# some. The image, its patches and those of the teacher's image were 320 KiB.
MAX_KIB_PER_IMAGE = 100
# Freed memory is returned at once: what remains is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

PEAK = """
import resource, sys
from pathlib import Path
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
settings = EvaluateSettings(sys.argv[1], Path(sys.argv[2]), count=int(sys.argv[3]), num_resamples=2)
evaluate(settings)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_evaluate_does_not_hold_the_images(tmp_path: Path) -> None:
    # The images of both systems exist: noise, as files and in the cache
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (COUNTS[-1], 64, 64, 3), np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:06d}.png")
    teacher = load_system("pocket-teacher")
    prompts = scenes.captions(range(COUNTS[-1]), HELD_OUT_WORLD)
    folder = ImageSet(teacher, prompts, 0, tmp_path / "cache").folder
    for start in range(0, COUNTS[-1], CHUNK):
        chunk = slice(start, start + CHUNK)
        tensors = {"pictures": torch.from_numpy(images[chunk].copy())}
        checkpoint.save(
            folder / f"{start:06d}-{CHUNK}.safetensors", tensors, {"prompts": prompts[chunk]}
        )

    peaks = []
    for count in COUNTS:
        arguments = [str(tmp_path / "images"), str(tmp_path / "cache"), str(count)]
        command = [sys.executable, "-c", PEAK, *arguments]
        environment = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks.append(int(found.stdout))
    kib_per_image = (peaks[1] - peaks[0]) / (COUNTS[1] - COUNTS[0])
    print(f"peak memory in KiB: {peaks}, {kib_per_image:.0f} per image")
    assert kib_per_image < MAX_KIB_PER_IMAGE, peaks
