"""A latent optimised from noise towards a target under each distance: what each one's minimum looks like.

    python benchmarks/direct_optimisation.py

Residual: pixel LPIPS between the decoded result and the decoded target, by the pocket's pixel network (Kang et al.
2024 report .016 under LPIPS, .490 under LatentLPIPS, .001 under E-LatentLPIPS, on Stable Diffusion's latents). Writes
docs/results/direct_optimisation.json, docs/images/direct_optimisation.png (targets above, one row a distance) and
docs/images/direct_optimisation.svg (residual against step; `--redraw` makes it from the results alone).
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

from diffusion2gan.evaluate.run import HELD_OUT_WORLD
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import read_json, write_image, write_json
from diffusion2gan.runtime.images import contact_sheet
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.autoencoder import decode, encode, load_vae

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "direct_optimisation.json"
CURVES = DOCS / "images" / "direct_optimisation.svg"
FAMILIES = ("blit", "geometric", "color", "cutout", "geometric+cutout")
Distance = Callable[[Tensor, Tensor], Tensor]


def distances(pixel: PixelLPIPS) -> dict[str, Distance]:
    plain: dict[str, Distance] = {
        "mse": lambda a, b: (a - b).square().mean((1, 2, 3)),
        "pixel_lpips": pixel,
        "latent_lpips": LatentLPIPS.from_pretrained(),
    }
    return plain | {
        f"e_latent_lpips {name}": ELatentLPIPS.from_pretrained(transforms=name) for name in FAMILIES
    }


def optimise(
    distance: Distance, target: Tensor, steps: int, peak_lr: float, residual: Distance
) -> dict[str, Any]:
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
        "residual": float(each.mean()),
        "residuals": each.tolist(),
        "curve": curve,
        "latents": x.detach(),
        "latent_mse": float((x - target).square().mean()),
        "seconds": time.perf_counter() - start,
    }


def draw_curves(rows: dict[str, Any]) -> None:
    series = {name: row["curve"] for name, row in rows.items()}
    lines.draw(
        CURVES,
        [lines.panel("residual: pixel LPIPS to the target", series, 1e-4, 10, logarithmic=True)],
        "steps",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--peak-lr", type=float, default=0.1)
    parser.add_argument(
        "--redraw", action="store_true", help="the curves alone, from the results that are there"
    )
    args = parser.parse_args()
    if args.redraw:
        draw_curves(read_json(RESULTS)["rows"])
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
        "command": f"python benchmarks/direct_optimisation.py {settings}",
        "gpu": "not measured",
        "device": f"CPU, {torch.get_num_threads()} threads",
        "rows": rows,
    }
    write_json(RESULTS, result)
    draw_curves(rows)
    write_image(
        DOCS / "images" / "direct_optimisation.png",
        contact_sheet(torch.cat(pictures), args.targets).save,
    )
    for name, row in rows.items():
        print(
            f"{name:32} residual {row['residual']:.4f}  latent MSE {row['latent_mse']:.4f}  {row['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
