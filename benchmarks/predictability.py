"""How the regression losses compare when part of the noise is hidden from the student.

    python benchmarks/predictability.py --shares 0 0.25 0.5 0.75 --seeds 0 1

With a hidden share s, the student is trained on √(1 − s)·z + √s·(fresh noise) in the place of z: a
share s of what decides the teacher's image cannot be predicted. At evaluation it receives ordinary
noise. Pairs: the shipped set, completed as `demo` does it. Writes docs/results/predictability.json
after every student and docs/images/predictability.svg; run it again to continue.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, get_args

import lines
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion2gan.demo import complete_shipped_pairs
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run, load_recipe_teacher, open_run
from diffusion2gan.distill.steps import step_seed
from diffusion2gan.distill.train import train
from diffusion2gan.evaluate.images import ImageSet, iterate_images
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.export import export
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import open_set
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.recipe import LossName, Recipe, load_recipe
from diffusion2gan.runtime.files import read_json, write_json
from diffusion2gan.teacher.conditioning import Conditioning

DOCS = Path(__file__).parent.parent / "docs"
OUT = DOCS / "results" / "predictability.json"
FIGURE = DOCS / "images" / "predictability.svg"

HIDDEN_NOISE = 2  # a step's stream of random numbers; 0 is the student's, 1 the discriminator's
REPORTED = (
    "frechet_distance",
    "patch_frechet_distance",
    "attribute_accuracy",
    "clip_score",
    "same_noise_distance",
    "precision",
    "recall",
    "intervals",
    "count",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--losses", nargs="+", default=list(get_args(LossName)))
    parser.add_argument("--total-pairs", type=int, default=8000)
    parser.add_argument("--count", type=int, default=1000, help="held-out captions")
    parser.add_argument("--pairs", type=Path, default=Path("work/predictability/pairs"))
    parser.add_argument("--work", type=Path, default=Path("work/predictability"))
    args = parser.parse_args()
    complete_shipped_pairs(args.pairs)

    result: dict[str, Any] = read_json(OUT) if OUT.exists() else {"rows": {}}
    spec = open_set(args.pairs)
    result["command"] = "python benchmarks/predictability.py"
    result["gpu"] = "not measured"
    result["pairs"] = {**vars(spec), "latent_shape": list(spec.latent_shape)}
    result["total_pairs"] = args.total_pairs

    for seed in args.seeds:
        for share in args.shares:
            for loss in args.losses:
                name = f"{loss}, share {share:g}, seed {seed}"
                if name not in result["rows"]:
                    row = measure_student(args, loss, share, seed)
                    result["rows"][name] = {"loss": loss, "share": share, "seed": seed, **row}
                    write_json(OUT, result)
                print_row(name, result["rows"][name])
    write_figure(result["rows"])


def measure_student(args: argparse.Namespace, loss: str, share: float, seed: int) -> dict[str, Any]:
    """Trains, exports and measures one student."""
    settings = [f"loss={loss}", f"seed={seed}", f"total_pairs={args.total_pairs}"]
    recipe = load_recipe("pocket-regression", [*settings, "sample_every=1000000"])
    return measure_recipe(recipe, args, args.work / f"{loss}-{share:g}-{seed}", share)


def measure_recipe(
    recipe: Recipe, args: argparse.Namespace, folder: Path, share: float
) -> dict[str, Any]:
    """The same for any recipe; the run and its export are in `folder`."""
    exported = folder / "export"
    if not exported.exists():
        train_student(recipe, args.pairs, folder / "run", share)
        export(folder / "run", exported)

    cache = args.work / "pictures"
    metrics = evaluate(EvaluateSettings(str(exported), cache, count=args.count))
    row = {key: metrics[key] for key in REPORTED if key in metrics}
    row["sharpness"] = relative_sharpness(str(exported), args.count, cache)
    return row


def train_student(recipe: Recipe, pairs: Path, out: Path, share: float) -> None:
    """As the job `distill`, with a share of the noise hidden from the student."""
    teacher = load_recipe_teacher(recipe)
    reader = PairReader(pairs, recipe.seed)
    distance = build_distance(recipe, teacher.device, teacher)
    run = Run(recipe, teacher)
    open_run(run, out, reader.spec)
    forward = run.student.forward

    def forward_on_mixed_noise(noise: Tensor, cond: Conditioning) -> Tensor:
        seed = step_seed(recipe.seed, run.pairs_seen, HIDDEN_NOISE)
        generator = torch.Generator("cpu").manual_seed(seed)
        fresh = torch.randn(noise.shape, generator=generator)
        return forward(math.sqrt(1 - share) * noise + math.sqrt(share) * fresh, cond)

    run.student.forward = forward_on_mixed_noise  # type: ignore[method-assign]
    try:
        train(run, reader, distance, out)
    finally:
        run.wait_until_saved()


def relative_sharpness(system: str, count: int, cache: Path) -> float:
    """Mean absolute Laplacian of the images, over that of real scenes of the same captions."""
    prompts = scenes.captions(range(count), HELD_OUT_WORLD)
    image_set = ImageSet(load_system(system), prompts, 0, cache)
    images = [image for batch in iterate_images(image_set) for image in batch]
    real = scenes.draw(range(count), HELD_OUT_WORLD).images.permute(0, 2, 3, 1).numpy()
    return mean_laplacian(np.stack(images) / 127.5 - 1) / mean_laplacian(real)


def mean_laplacian(images: NDArray[Any]) -> float:
    """The mean of |4·x − the sum of its four neighbours| over images [N, H, W, 3]."""
    centre = images[:, 1:-1, 1:-1]
    vertical = images[:, :-2, 1:-1] + images[:, 2:, 1:-1]
    horizontal = images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    return float(np.abs(4 * centre - vertical - horizontal).mean())


def print_row(name: str, row: dict[str, Any]) -> None:
    print(
        f"{name:34} Fréchet {row['frechet_distance']:.2f}  patches "
        f"{row['patch_frechet_distance']:.2f}  attributes {row['attribute_accuracy']:.1%}  "
        f"sharpness {row['sharpness']:.2f}",
        flush=True,
    )


def write_figure(rows: dict[str, dict[str, Any]]) -> None:
    """One panel per metric: a line per loss over the hidden share, the mean over seeds."""
    panels = []
    for key, title, high in (
        ("frechet_distance", "Fréchet distance", 12),
        ("patch_frechet_distance", "Fréchet distance of patches", 28),
        ("attribute_accuracy", "attributes right", 1),
        ("sharpness", "sharpness, 1 = real scenes", 1),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for loss in dict.fromkeys(row["loss"] for row in rows.values()):
            of_loss = [row for row in rows.values() if row["loss"] == loss]
            series[loss] = []
            for share in sorted({row["share"] for row in of_loss}):
                values = [row[key] for row in of_loss if row["share"] == share]
                series[loss].append((share, sum(values) / len(values)))
        panels.append(lines.panel(title, series, 0, high))
    lines.draw(FIGURE, panels, "share of the noise hidden from the student")


if __name__ == "__main__":
    main()
