"""Optimises a latent from noise towards a target under each distance, to see its minimum.

    python benchmarks/direct_optimisation.py

Residual: pixel LPIPS between the decoded result and the decoded target, by the pocket's pixel
network. Kang et al. 2024 report 0.016 under LPIPS, 0.490 under LatentLPIPS and 0.001 under
E-LatentLPIPS, on Stable Diffusion's latents.

Writes docs/results/direct_optimisation.json, docs/images/direct_optimisation.png (targets above,
one row per distance) and docs/images/direct_optimisation.svg (residual against step; `--redraw`
draws it from the existing results).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lines
import torch
from torch import Tensor

from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import read_json, write_image, write_json
from diffusion2gan.runtime.images import contact_sheet
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.autoencoder import decode, encode, load_vae

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "direct_optimisation.json"
CURVES = DOCS / "images" / "direct_optimisation.svg"
TRANSFORMS = ("blit", "geometric", "color", "cutout", "geometric+cutout")
Distance = Callable[[Tensor, Tensor], Tensor]


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3))


def build_distances(pixel_lpips: PixelLPIPS) -> dict[str, Distance]:
    distances: dict[str, Distance] = {
        "mse": mse,
        "pixel_lpips": pixel_lpips,
        "latent_lpips": LatentLPIPS.from_pretrained(),
    }
    for transforms in TRANSFORMS:
        distances[f"e_latent_lpips {transforms}"] = ELatentLPIPS.from_pretrained(
            transforms=transforms
        )
    return distances


def optimise(
    distance: Distance, target: Tensor, num_steps: int, peak_lr: float, residual: Distance
) -> dict[str, Any]:
    """Adam from N(0, I), with a learning rate that falls to zero as a cosine.

    `curve` has (step, mean residual) at every twentieth of the steps.
    """
    torch.manual_seed(0)
    x = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=peak_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)

    curve = []
    start = time.perf_counter()
    for step in range(num_steps + 1):
        if step % (num_steps // 20) == 0:
            with torch.no_grad():
                curve.append((step, float(residual(x, target).mean())))
        optimizer.zero_grad()
        distance(x, target).sum().backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        residuals = residual(x, target)
    return {
        "residual": float(residuals.mean()),
        "residuals": residuals.tolist(),
        "curve": curve,
        "latents": x.detach(),
        "latent_mse": float((x - target).square().mean()),
        "seconds": time.perf_counter() - start,
    }


def draw_curves(rows: dict[str, Any]) -> None:
    series = {name: row["curve"] for name, row in rows.items()}
    panel = lines.panel("residual: pixel LPIPS to the target", series, 1e-4, 10, logarithmic=True)
    lines.draw(CURVES, [panel], "steps")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--peak-lr", type=float, default=0.1)
    parser.add_argument(
        "--redraw", action="store_true", help="only draw the curves, from the existing results"
    )
    args = parser.parse_args()
    if args.redraw:
        draw_curves(read_json(RESULTS)["rows"])
        return

    # Targets: latents of held-out renderings
    vae = load_vae("pocket")
    pixel_lpips = PixelLPIPS.from_pretrained("pocket", vae)
    target = encode(vae, scenes.draw(range(args.targets), HELD_OUT_WORLD).images)

    # One optimisation per distance
    rows = {}
    images = [decode(vae, target)]
    distances = build_distances(pixel_lpips)
    with Bar("direct optimisation", len(distances)) as bar:
        for name, distance in distances.items():
            row = optimise(distance, target, args.steps, args.peak_lr, pixel_lpips)
            images.append(decode(vae, row.pop("latents")))
            rows[name] = row
            bar.advance(1, f"{name}: {row['residual']:.4f}")

    # Results and figures
    settings = f"--targets {args.targets} --steps {args.steps} --peak-lr {args.peak_lr:g}"
    result = {
        "command": f"python benchmarks/direct_optimisation.py {settings}",
        "gpu": "not measured",
        "device": f"CPU, {torch.get_num_threads()} threads",
        "rows": rows,
    }
    write_json(RESULTS, result)
    draw_curves(rows)
    sheet = contact_sheet(torch.cat(images), args.targets)
    write_image(DOCS / "images" / "direct_optimisation.png", sheet.save)
    for name, row in rows.items():
        print(
            f"{name:32} residual {row['residual']:.4f}  latent MSE {row['latent_mse']:.4f}  "
            f"{row['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
