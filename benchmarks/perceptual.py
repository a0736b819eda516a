"""The perceptual distances compared: as a student's loss, in direct optimisation, and by cost.

    python benchmarks/perceptual.py --shares 0 0.5 --seeds 0 1

Distances: mse, LPIPS of decoded images, LatentLPIPS by a network fitted to labels, by one distilled
without them, by a compact distilled one, the VAE's decoder, the teacher's features. Each of the
latter five without transforms, with those of the default recipe, and with --new-transforms.

Per distance and transforms: students trained with a share of the noise hidden (predictability.py),
a latent optimised towards a target (direct_optimisation.py), time and memory of the loss. The two
distilled networks are made first, from the same pairs. Writes --out after every measurement, and a
figure; run it again to continue.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lines
import torch
from direct_optimisation import optimise
from loss_cost import peak_bytes
from predictability import measure_recipe

from diffusion2gan.demo import complete_shipped_pairs
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD
from diffusion2gan.pairs.store import open_set
from diffusion2gan.perceptual.augment import NO_TRANSFORMS, TransformSettings
from diffusion2gan.perceptual.distance import LatentLPIPS, PixelLPIPS
from diffusion2gan.perceptual.distil import DistilSettings, distil, measure_agreement
from diffusion2gan.pocket import models, scenes
from diffusion2gan.recipe import Recipe, load_recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.cache import Cache
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.teacher.autoencoder import encode
from diffusion2gan.teacher.loading import load_teacher

DOCS = Path(__file__).parent.parent / "docs"
OUT = DOCS / "results" / "perceptual.json"
FIGURE = DOCS / "images" / "perceptual.svg"

PLAIN = ("mse", "pixel LPIPS")  # have no transforms
DISTANCES = (*PLAIN, "labels", "distilled", "compact", "decoder", "teacher")
TRANSFORMS = ("none", "shipped", "new")


def row_settings(distance: str, transforms: str, args: argparse.Namespace) -> list[str]:
    """The settings of the recipe pocket-regression that make this row."""
    if distance == "mse":
        return ["loss=mse"]
    if distance == "pixel LPIPS":
        return ["loss=pixel_lpips"]

    network = {
        "labels": "pocket",
        "distilled": str(args.work / "distilled"),
        "compact": str(args.work / "compact"),
    }.get(distance, distance)
    settings = [f"perceptual={network}"]
    if transforms == "none":
        return [*settings, "loss=latent_lpips"]
    settings.append("loss=e_latent_lpips")
    if transforms == "new":
        settings += args.new_transforms
    return settings


def all_rows(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(distance, transforms) of every row, the most informative first."""
    rows = []
    for distance in args.distances:
        for transforms in args.transforms:
            if transforms == "none" or distance not in PLAIN:
                rows.append((distance, transforms))
    return rows


def row_name(distance: str, transforms: str) -> str:
    return distance if distance in PLAIN else f"{distance}, {transforms} transforms"


def row_recipe(distance: str, transforms: str, args: argparse.Namespace, seed: int = 0) -> Recipe:
    settings = row_settings(distance, transforms, args)
    settings += [f"seed={seed}", f"total_pairs={args.total_pairs}", "sample_every=1000000"]
    return load_recipe("pocket-regression", settings)


def make_networks(args: argparse.Namespace) -> dict[str, Any]:
    """Distils the full and the compact network; returns their reports."""
    reports = {}
    for name in ("distilled", "compact"):
        if name not in args.distances:
            continue
        folder = args.work / name
        if not (folder / "distil.json").exists():
            transforms = NO_TRANSFORMS
            if args.distil_transforms:
                families = ("geometric", "cutout")
                transforms = TransformSettings(families, share=0.7, resampling="bicubic")
            settings = DistilSettings(
                widths=tuple(models.latent_vgg().config["widths"]),
                compact=name == "compact",
                count=args.distil_count,
                epochs=args.distil_epochs,
                transforms=transforms,
            )
            distil(args.pairs, "pocket", "pocket", folder, settings)
        reports[name] = read_json(folder / "distil.json")
        reports["labels"] = {"held_out": measure_labels(folder / "work" / "held_out")}
    return reports


def measure_labels(held_out: Path) -> dict[str, Any]:
    """The agreement of the network fitted to labels, on the held-out latents of a distillation."""
    files = [checkpoint.load(path)[0] for path in sorted(held_out.glob("*.safetensors"))]
    chunks = {name: [rows[name] for rows in files] for name in files[0]}
    network = LatentLPIPS.from_pretrained("pocket")
    return measure_agreement(network, Cache(chunks, []), torch.device("cpu"))


def measure_optimisation(recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """The residual after optimising a latent from noise towards held-out renderings."""
    teacher = load_teacher("pocket")
    target = encode(teacher.vae, scenes.draw(range(args.targets), HELD_OUT_WORLD).images)
    residual = PixelLPIPS.from_pretrained("pocket", teacher.vae)
    distance = build_distance(recipe, teacher.device, teacher)
    row = optimise(distance, target, args.steps, 0.1, residual)
    return {key: row[key] for key in ("residual", "residuals", "latent_mse", "seconds")}


def measure_cost(recipe: Recipe, repeats: int = 15) -> dict[str, float]:
    """Milliseconds of forward and backward for one pair of latents (median), and peak MiB."""
    teacher = load_teacher("pocket")
    distance = build_distance(recipe, teacher.device, teacher)
    a, b = torch.randn(2, 1, *teacher.latent_shape)
    a.requires_grad_()
    baseline = peak_bytes("cpu")
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        distance(a, b).sum().backward()
        times.append(time.perf_counter() - start)
    peak_mib = (peak_bytes("cpu") - baseline) / 2**20
    return {"ms": 1000 * statistics.median(times[1:]), "peak_mib": peak_mib}


def measure_cost_in_new_process(name: str) -> dict[str, float]:
    """`measure_cost` of a row in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, *sys.argv, "--cost", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compute_bars(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The aims, each a ratio of two measurements and its limit; None where one is missing."""

    def frechet(name: str) -> float | None:
        values = []
        for student in rows.get(name, {}).get("students", {}).values():
            if student["share"] == 0.5:
                values.append(student["frechet_distance"])
        return statistics.fmean(values) if values else None

    def residual(name: str) -> float | None:
        value = rows.get(name, {}).get("optimisation", {}).get("residual")
        return None if value is None else float(value)

    free = [frechet(row_name(d, t)) for d in ("decoder", "teacher") for t in TRANSFORMS]
    measured_free = [value for value in free if value is not None]
    best_free = min(measured_free) if measured_free else None

    labels = row_name("labels", "none")
    ensembled = row_name("labels", "new")
    distilled = row_name("distilled", "none")
    comparisons = {
        "new transforms / none, Fréchet at 0.5": (frechet(ensembled), frechet(labels), 1.0),
        "new transforms / none, residual": (residual(ensembled), residual(labels), 0.1),
        "distilled / by labels, Fréchet at 0.5": (frechet(distilled), frechet(labels), 1.05),
        "best without data / mse, Fréchet at 0.5": (best_free, frechet("mse"), 0.5),
    }

    bars = {}
    for name, (numerator, denominator, limit) in comparisons.items():
        ratio = None
        if numerator is not None and denominator is not None:
            ratio = numerator / denominator
        bars[name] = {
            "ratio": ratio,
            "limit": limit,
            "reached": None if ratio is None else ratio <= limit,
        }
    return bars


def write_figure(rows: dict[str, dict[str, Any]], figure: Path) -> None:
    """Fréchet distance over the hidden share, a panel per kind of transforms, mse in each."""
    panels = []
    for transforms in TRANSFORMS:
        series: dict[str, list[tuple[float, float]]] = {}
        for distance in DISTANCES:
            students = rows.get(row_name(distance, transforms), {}).get("students", {})
            points = []
            for share in sorted({student["share"] for student in students.values()}):
                values = []
                for student in students.values():
                    if student["share"] == share:
                        values.append(student["frechet_distance"])
                points.append((share, statistics.fmean(values)))
            if points:
                series[distance] = points
        if series:
            panels.append(lines.panel(f"Fréchet distance, {transforms} transforms", series, 0, 12))
    lines.draw(figure, panels, "share of the noise hidden from the student")


def print_row(name: str, row: dict[str, Any]) -> None:
    print(
        f"{name:32} residual {row['optimisation']['residual']:.4f}  {row['cost']['ms']:.2f} ms  "
        f"{row['cost']['peak_mib']:.0f} MiB",
        flush=True,
    )
    for key, student in row["students"].items():
        print(
            f"    {key:24} Fréchet {student['frechet_distance']:.2f}  patches "
            f"{student['patch_frechet_distance']:.2f}  attributes "
            f"{student['attribute_accuracy']:.1%}  same noise "
            f"{student['same_noise_distance']:.4f}  sharpness {student['sharpness']:.2f}",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--distances", nargs="+", default=list(DISTANCES), choices=DISTANCES)
    parser.add_argument("--transforms", nargs="+", default=list(TRANSFORMS), choices=TRANSFORMS)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--total-pairs", type=int, default=8000)
    parser.add_argument("--count", type=int, default=1000, help="held-out captions")
    parser.add_argument("--targets", type=int, default=8, help="of the direct optimisation")
    parser.add_argument("--steps", type=int, default=600, help="of the direct optimisation")
    parser.add_argument("--distil-count", type=int, default=4000, help="latents to distil from")
    parser.add_argument("--distil-epochs", type=int, default=8)
    parser.add_argument("--distil-transforms", action="store_true", help="distil under transforms")
    parser.add_argument(
        "--new-transforms",
        nargs="+",
        default=["resampling=bicubic", "transform_share=0.5"],
        help="settings of the rows `new`",
    )
    parser.add_argument("--pairs", type=Path, default=Path("work/perceptual/pairs"))
    parser.add_argument("--work", type=Path, default=Path("work/perceptual"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument(
        "--networks-only", action="store_true", help="only distil the networks and report on them"
    )
    parser.add_argument("--cost", help="measure the cost of this row and print a line of JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.cost:
        (row,) = [row for row in all_rows(args) if row_name(*row) == args.cost]
        print(json.dumps(measure_cost(row_recipe(*row, args))))
        return
    complete_shipped_pairs(args.pairs)

    # Description of the measurement
    result: dict[str, Any] = read_json(args.out) if args.out.exists() else {"rows": {}}
    spec = open_set(args.pairs)
    result["command"] = shlex.join(["python", "benchmarks/perceptual.py", *sys.argv[1:]])
    result["gpu"] = "not measured"
    result["device"] = f"CPU, {torch.get_num_threads()} threads"
    result["pairs"] = {**vars(spec), "latent_shape": list(spec.latent_shape)}
    result["total_pairs"] = args.total_pairs
    result["new_transforms"] = args.new_transforms
    result["networks"] = make_networks(args)
    write_json(args.out, result)
    for name, report in result["networks"].items():
        print(f"network {name}: {report['held_out']}", flush=True)
    if args.networks_only:
        return

    # The rows
    for distance, transforms in all_rows(args):
        name = row_name(distance, transforms)
        row = result["rows"].setdefault(name, {"students": {}})
        row["settings"] = row_settings(distance, transforms, args)
        recipe = row_recipe(distance, transforms, args)
        if "cost" not in row:
            row["cost"] = measure_cost_in_new_process(name)
        if "optimisation" not in row:
            row["optimisation"] = measure_optimisation(recipe, args)
        write_json(args.out, result)

        # One student per seed and share
        for seed in args.seeds:
            for share in args.shares:
                key = f"share {share:g}, seed {seed}"
                if key in row["students"]:
                    continue
                recipe = row_recipe(distance, transforms, args, seed)
                folder = args.work / "students" / f"{name}-{share:g}-{seed}".replace(" ", "-")
                student = measure_recipe(recipe, args, folder, share)
                row["students"][key] = {"share": share, "seed": seed, **student}
                result["bars"] = compute_bars(result["rows"])
                write_json(args.out, result)
        print_row(name, row)
    write_figure(result["rows"], args.figure)


if __name__ == "__main__":
    main()
