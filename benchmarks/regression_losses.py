"""Students that differ only in the regression loss: the same pairs, number of pairs and settings.

    python benchmarks/regression_losses.py --losses mse e_latent_lpips

Pairs: the shipped set, completed as `demo` does it, or those of --pairs. Writes
docs/results/NAME.json (rows are added to the existing ones) and docs/images/NAME.png. Run it again
to continue.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch

from diffusion2gan.cost.distill import dry_run
from diffusion2gan.demo import complete_shipped_pairs
from diffusion2gan.distill.train import distill
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.export import export
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import open_set
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.recipe import LossName, load_recipe
from diffusion2gan.runtime.files import read_json, write_image, write_json
from diffusion2gan.runtime.images import contact_sheet, from_uint8

DOCS = Path(__file__).parent.parent / "docs"
DEFAULT_PAIRS = Path("work/pairs")
NUM_SHOWN = 8


def measure_student(args: argparse.Namespace, loss: str) -> dict[str, Any]:
    """Trains, exports and measures one student."""
    recipe = load_recipe(args.recipe, [f"loss={loss}", *args.set])
    run = args.work / loss / "run"
    exported = args.work / loss / "export"
    distill(recipe, args.pairs, run)
    if not exported.exists():
        export(run, exported)

    step_s = float(dry_run(recipe, args.pairs)["seconds_per_step"])
    metrics = evaluate(EvaluateSettings(str(exported), args.work / "pictures", count=args.count))
    metrics["system"] = f"student, {loss}"
    return {"training_pairs_per_second": recipe.batch_size / step_s, **metrics}


def write_figure(args: argparse.Namespace) -> None:
    """Images of eight prompts from the same noise: a line per loss, then the teacher."""
    systems = [load_system(str(args.work / loss / "export")) for loss in args.losses]
    systems.append(load_system("pocket-teacher"))

    prompts = scenes.captions(range(NUM_SHOWN), HELD_OUT_WORLD)
    noise = noise_from_seeds(range(NUM_SHOWN), systems[0].latent_shape)
    images = [from_uint8(system.generate(prompts, noise)) for system in systems]
    sheet = contact_sheet(torch.cat(images), NUM_SHOWN)
    write_image(DOCS / "images" / f"{args.name}.png", sheet.save)


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats this measurement, as it is kept in the results."""
    command = (
        f"python benchmarks/regression_losses.py --recipe {args.recipe} --name {args.name} "
        f"--losses {' '.join(args.losses)} --count {args.count}"
    )
    if args.set:
        command += f" --set {' '.join(args.set)}"
    return command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=DEFAULT_PAIRS)
    parser.add_argument("--recipe", default="pocket-regression")
    parser.add_argument(
        "--losses", nargs="+", default=["mse", "e_latent_lpips"], choices=get_args(LossName)
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("work/regression_losses"))
    parser.add_argument("--name", default="regression_losses")
    parser.add_argument("--set", nargs="*", default=[])
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.pairs == DEFAULT_PAIRS:
        complete_shipped_pairs(args.pairs)

    # Description of the measurement
    path = DOCS / "results" / f"{args.name}.json"
    result: dict[str, Any] = read_json(path) if path.exists() else {"rows": {}}
    pairs_spec = open_set(args.pairs)
    result["command"] = command_line(args)
    result["device"] = f"CPU, {torch.get_num_threads()} threads"
    result["gpu"] = "not measured"
    result["pairs"] = {**vars(pairs_spec), "latent_shape": list(pairs_spec.latent_shape)}
    result["recipe"] = load_recipe(args.recipe, args.set).model_dump(exclude={"loss"})

    # One student per loss, then the teacher
    for loss in args.losses:
        result["rows"][loss] = measure_student(args, loss)
        write_json(path, result)
    result["rows"]["teacher"] = evaluate(
        EvaluateSettings("pocket-teacher", args.work / "pictures", count=args.count)
    )
    write_json(path, result)

    write_figure(args)
    for name, row in result["rows"].items():
        print(
            f"{name:16} FD {row['frechet_distance']:.4f}  CLIP {row['clip_score']:.3f}  "
            f"attributes {row['attribute_accuracy']:.1%}  "
            f"same noise {row['same_noise_distance']:.4f}"
        )


if __name__ == "__main__":
    main()
