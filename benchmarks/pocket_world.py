"""The pocket world measured: scenes a second, VAE, probe on real renderings, teacher at 50 steps and at one, student.

    python benchmarks/pocket_world.py --count 1000 --work work/pocket_world

Writes docs/results/pocket_world.json and the sheets docs/images/{scenes,vae,teacher,student}.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from diffusion2gan.evaluate.features import attributes_right, load_probe
from diffusion2gan.evaluate.metrics import share
from diffusion2gan.evaluate.run import HELD_OUT_WORLD, evaluate, real_pictures
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import write_image, write_json
from diffusion2gan.runtime.images import contact_sheet, from_uint8
from diffusion2gan.teacher.loading import load_teacher

DOCS = Path(__file__).parent.parent / "docs"


def scenes_per_second(count: int = 1024) -> float:
    scenes.draw(range(64), 3)
    start = time.perf_counter()
    for first in range(0, count, 64):
        scenes.draw(range(first, first + 64), 3)
    return count / (time.perf_counter() - start)


@torch.no_grad()
def vae_psnr(count: int = 256) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean PSNR in dB of held-out pictures through the VAE; the pictures and their reconstructions."""
    vae = load_teacher().vae
    images = scenes.draw(range(count), HELD_OUT_WORLD).images
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    errors = (images - decoded).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / errors)).mean()), images, decoded


def measured(system: str, args: argparse.Namespace) -> dict[str, Any]:
    return evaluate(system, count=args.count, seed=0, cache=args.work, num_noises=args.num_noises)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--num-noises", type=int, default=8, help="pictures a caption, for the diversity"
    )
    parser.add_argument("--work", type=Path, default=Path("work/pocket_world"))
    args = parser.parse_args()
    pace = scenes_per_second()
    psnr, images, decoded = vae_psnr()
    prompts = scenes.captions(range(args.count), HELD_OUT_WORLD)
    right = attributes_right(load_probe(), real_pictures(args.count, 0), prompts)
    result: dict[str, Any] = {
        "command": f"python benchmarks/pocket_world.py --count {args.count} --num-noises {args.num_noises}",
        "device": f"CPU, {torch.get_num_threads()} threads",
        "gpu": "not measured",
        "scenes_per_second": pace,
        "vae_psnr_db": psnr,
        "probe_accuracy_on_real": share(
            [answer for answers in right.values() for answer in answers]
        ),
        "probe_accuracy_on_real_by_kind": {kind: share(answers) for kind, answers in right.items()},
        "teacher": measured("pocket-teacher", args),
        "student": measured("pocket-student", args),
        "teacher_one_step": evaluate(
            "pocket-teacher", count=args.count, seed=0, cache=args.work, num_inference_steps=1
        ),
    }
    write_json(DOCS / "results" / "pocket_world.json", result)
    write_image(DOCS / "images" / "scenes.png", contact_sheet(images[:32], 8).save)
    pairs = torch.cat([torch.cat([images[i : i + 8], decoded[i : i + 8]]) for i in (0, 8)])
    write_image(DOCS / "images" / "vae.png", contact_sheet(pairs, 8).save)
    for name in ("teacher", "student"):  # the same noises
        system = load_system(f"pocket-{name}")
        shown = from_uint8(
            system.generate(prompts[:32], noise_from_seeds(range(32), system.latent_shape))
        )
        write_image(DOCS / "images" / f"{name}.png", contact_sheet(shown, 8).save)
    for key, value in result.items():
        print(f"{key}: {value}", file=sys.stdout)


if __name__ == "__main__":
    main()
