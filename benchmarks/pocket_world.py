"""Measures the pocket world: renderer, VAE, probe, teacher (50 steps and one step) and student.

    python benchmarks/pocket_world.py --count 1000 --work work/pocket_world

Writes docs/results/pocket_world.json and the sheets docs/images/{scenes,vae,teacher,student}.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusion2gan.evaluate.features import load_probe, score_attributes
from diffusion2gan.evaluate.metrics import accuracy
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD, real_images
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import write_image, write_json
from diffusion2gan.runtime.images import contact_sheet, from_uint8
from diffusion2gan.teacher.loading import load_teacher

DOCS = Path(__file__).parent.parent / "docs"
IMAGES = DOCS / "images"
NUM_SHOWN = 32


def scenes_per_second(count: int = 1024) -> float:
    scenes.draw(range(64), 3)  # warm-up
    start = time.perf_counter()
    for first in range(0, count, 64):
        scenes.draw(range(first, first + 64), 3)
    return count / (time.perf_counter() - start)


@torch.no_grad()
def vae_psnr(count: int = 256) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean PSNR in dB of held-out images through the VAE; the images and their reconstructions."""
    vae = load_teacher().vae
    images = scenes.draw(range(count), HELD_OUT_WORLD).images
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    errors = (images - decoded).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / errors)).mean()), images, decoded


def measure(system: str, args: argparse.Namespace) -> dict[str, Any]:
    return evaluate(
        EvaluateSettings(system, args.work, count=args.count, num_noises=args.num_noises)
    )


def write_figures(images: torch.Tensor, decoded: torch.Tensor, prompts: Sequence[str]) -> None:
    """Renderings, the VAE's reconstructions, and teacher and student from the same noise."""
    write_image(IMAGES / "scenes.png", contact_sheet(images[:NUM_SHOWN], 8).save)

    # Two lines of images, each above its reconstructions
    rows = torch.cat([images[:8], decoded[:8], images[8:16], decoded[8:16]])
    write_image(IMAGES / "vae.png", contact_sheet(rows, 8).save)

    for name in ("teacher", "student"):
        system = load_system(f"pocket-{name}")
        noise = noise_from_seeds(range(NUM_SHOWN), system.latent_shape)
        generated = from_uint8(system.generate(prompts[:NUM_SHOWN], noise))
        write_image(IMAGES / f"{name}.png", contact_sheet(generated, 8).save)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--num-noises", type=int, default=8, help="images per caption, for the diversity"
    )
    parser.add_argument("--work", type=Path, default=Path("work/pocket_world"))
    args = parser.parse_args()

    # Renderer, VAE, and the probe on real renderings
    pace = scenes_per_second()
    psnr, images, decoded = vae_psnr()
    prompts = scenes.captions(range(args.count), HELD_OUT_WORLD)
    right_by_kind = score_attributes(load_probe(), real_images(args.count, 0), prompts)
    all_right = [right for kind in right_by_kind.values() for right in kind]

    result: dict[str, Any] = {
        "command": (
            f"python benchmarks/pocket_world.py --count {args.count} --num-noises {args.num_noises}"
        ),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "gpu": "not measured",
        "scenes_per_second": pace,
        "vae_psnr_db": psnr,
        "probe_accuracy_on_real": accuracy(all_right),
        "probe_accuracy_on_real_by_kind": {
            kind: accuracy(right) for kind, right in right_by_kind.items()
        },
        "teacher": measure("pocket-teacher", args),
        "student": measure("pocket-student", args),
        "teacher_one_step": evaluate(
            EvaluateSettings("pocket-teacher", args.work, count=args.count, num_inference_steps=1)
        ),
    }
    write_json(DOCS / "results" / "pocket_world.json", result)
    write_figures(images, decoded, prompts)
    for key, value in result.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
