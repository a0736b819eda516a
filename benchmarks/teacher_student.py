"""The README's picture: teacher (50 steps) above student (1 step), same prompts, same noises.

    python benchmarks/teacher_student.py

The prompts are the first ones of the demo's report, not selected. The times in the labels are read
from docs/results/pocket_world.json. Writes docs/images/teacher_student.png.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion2gan.demo import REPORT_SEED, REPORT_WORLD
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import write_image

DOCS = Path(__file__).parent.parent / "docs"
TILE, GAP = 200, 10  # pixels
LABEL_WIDTH, CAPTION_HEIGHT = 210, 88
INK, FAINT = (30, 30, 34), (110, 110, 118)


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_row(
    canvas: Image.Image, top: int, images: np.ndarray, label: tuple[str, str, str]
) -> None:
    """One system: three lines of label, then its images, enlarged by Lanczos."""
    draw = ImageDraw.Draw(canvas)
    name, steps, seconds = label
    draw.text((GAP, top + 60), name, INK, load_font(30))
    draw.text((GAP, top + 102), steps, FAINT, load_font(22))
    draw.text((GAP, top + 132), seconds, FAINT, load_font(22))

    for column, image in enumerate(images):
        tile = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)
        canvas.paste(tile, (LABEL_WIDTH + column * (TILE + GAP), top))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=6, help="number of prompts")
    parser.add_argument("--out", type=Path, default=DOCS / "images" / "teacher_student.png")
    args = parser.parse_args()

    # 1. Both systems on the same prompts and noises
    prompts = scenes.captions(range(args.count), REPORT_WORLD)
    seeds = [pair_seed(REPORT_SEED, index) for index in range(args.count)]
    teacher, student = load_system("pocket-teacher"), load_system("pocket-student")
    noise = noise_from_seeds(seeds, teacher.latent_shape)
    measured = json.loads((DOCS / "results" / "pocket_world.json").read_text("utf-8"))
    rows = (
        ("Teacher", "50 steps", teacher.generate(prompts, noise), measured["teacher"]),
        ("Student", "1 step", student.generate(prompts, noise), measured["student"]),
    )

    # 2. The picture: one row per system, the prompts below
    width = LABEL_WIDTH + args.count * (TILE + GAP)
    height = GAP + len(rows) * (TILE + GAP) + CAPTION_HEIGHT
    canvas = Image.new("RGB", (width, height), "white")
    for number, (name, steps, images, metrics) in enumerate(rows):
        seconds = f"{metrics['seconds_per_image']:.2g} s per image"
        draw_row(canvas, GAP + number * (TILE + GAP), images, (name, steps, seconds))

    draw = ImageDraw.Draw(canvas)
    for column, prompt in enumerate(prompts):
        corner = (LABEL_WIDTH + column * (TILE + GAP), height - CAPTION_HEIGHT + 2)
        draw.multiline_text(corner, textwrap.fill(prompt, 22), FAINT, load_font(17), spacing=3)
    write_image(args.out, lambda path: canvas.save(path, optimize=True))
    print(f"{args.out}: {width}×{height}")


if __name__ == "__main__":
    main()
