"""A latent optimised from noise towards a target under each distance: what each one's minimum looks like.

    python benchmarks/direct_optimisation.py

Residual: pixel LPIPS between the decoded result and the decoded target, by the pocket's pixel network (Kang et al.
2024 report .016 under LPIPS, .490 under LatentLPIPS, .001 under E-LatentLPIPS, on Stable Diffusion's latents). Writes
docs/results/direct_optimisation.json, docs/images/direct_optimisation.png (targets above, one row a distance) and
docs/images/direct_optimisation.svg (residual against step; `--redraw` makes it from the results alone).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.evaluate.evaluate import HELD_OUT_WORLD
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import read_json, write_image, write_json
from diffusion2gan.runtime.images import sheet
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.autoencoder import decode, encode, load_vae

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "direct_optimisation.json"
CURVES = DOCS / "images" / "direct_optimisation.svg"
FAMILIES = ("blit", "geometric", "color", "cutout", "geometric+cutout")
Distance = Callable[[Tensor, Tensor], Tensor]


def distances(pixel: PixelLPIPS) -> dict[str, Distance]:
    plain: dict[str, Distance] = {
        "mse": lambda a, b: (a - b).square().mean((1, 2, 3)), "pixel_lpips": pixel,
        "latent_lpips": LatentLPIPS.from_pretrained(),
    }  # fmt: skip
    return plain | {f"e_latent_lpips {name}": ELatentLPIPS.from_pretrained(transforms=name) for name in FAMILIES}


def optimise(distance: Distance, target: Tensor, steps: int, peak_lr: float, residual: Distance) -> dict[str, Any]:
    """Adam from N(0, I), the rate a cosine to zero. The curve: (step, mean residual) every twentieth of the way."""
    torch.manual_seed(0)
    x = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=peak_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve, start = [], time.perf_counter()
    for step in range(steps + 1):
        if step % (steps // 20) == 0:
            with torch.no_grad():
                curve.append((step, float(residual(x, target).mean())))
        optimizer.zero_grad()
        distance(x, target).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        each = residual(x, target)
    return {
        "residual": float(each.mean()), "residuals": each.tolist(), "curve": curve, "latents": x.detach(),
        "latent_mse": float((x - target).square().mean()), "seconds": time.perf_counter() - start,
    }  # fmt: skip


COLOURS = ("#777777", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#000000")


def curves(rows: dict[str, Any]) -> str:
    """An SVG: residual (logarithmic, from 1e-4 to 10) against step, a line a distance."""
    width, height, left, lines = 420, 300, 44, []
    last = max(step for row in rows.values() for step, _ in row["curve"])

    def y_of(residual: float) -> float:
        return height * (1 - math.log10(min(max(residual, 1e-4), 10.0))) / 5

    for power in range(-4, 2):
        y = y_of(10.0**power)
        lines.append(f'<path d="M{left} {y:.0f}h{width}" stroke="#ddd"/><text x="4" y="{y + 4:.0f}">1e{power}</text>')
    for i, (name, row) in enumerate(rows.items()):
        points = " ".join(f"{left + width * step / last:.1f},{y_of(value):.1f}" for step, value in row["curve"])
        colour = COLOURS[i % len(COLOURS)]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{left + width + 10}" y="{16 + 18 * i}" fill="{colour}">{name}</text>')
    lines.append(f'<text x="{left}" y="{height + 18}">step 0</text>')
    lines.append(f'<text x="{left + width}" y="{height + 18}" text-anchor="end">{last}</text>')
    box = f'viewBox="0 -10 {left + width + 210} {height + 40}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="12">'
    paper = f'<rect y="-10" width="{left + width + 210}" height="{height + 40}" fill="white"/>'
    return "\n".join([head, paper, *lines, "</svg>", ""])


def draw(rows: dict[str, Any]) -> None:
    write_image(CURVES, lambda path: path.write_text(curves(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--peak-lr", type=float, default=0.1)
    parser.add_argument("--redraw", action="store_true", help="the curves alone, from the results that are there")
    args = parser.parse_args()
    if args.redraw:
        draw(read_json(RESULTS)["rows"])
        return
    vae = load_vae("pocket")
    pixel = PixelLPIPS.from_pretrained("pocket", vae)
    target = encode(vae, scenes.draw(range(args.targets), HELD_OUT_WORLD).images)
    rows, pictures = {}, [decode(vae, target)]
    tried = distances(pixel)
    with Bar("direct optimisation", len(tried)) as bar:
        for name, distance in tried.items():
            rows[name] = optimise(distance, target, args.steps, args.peak_lr, pixel)
            pictures.append(decode(vae, rows[name].pop("latents")))
            bar.advance(1, f"{name}: {rows[name]['residual']:.4f}")
    settings = f"--targets {args.targets} --steps {args.steps} --peak-lr {args.peak_lr:g}"
    result = {
        "command": f"python benchmarks/direct_optimisation.py {settings}", "gpu": "not measured",
        "device": f"CPU, {torch.get_num_threads()} threads", "rows": rows,
    }  # fmt: skip
    write_json(RESULTS, result)
    draw(rows)
    write_image(DOCS / "images" / "direct_optimisation.png", sheet(torch.cat(pictures), args.targets).save)
    for name, row in rows.items():
        print(f"{name:32} residual {row['residual']:.4f}  latent MSE {row['latent_mse']:.4f}  {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
