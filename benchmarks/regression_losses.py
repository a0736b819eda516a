"""Students that differ in the regression loss alone: same pairs, same number of pairs seen, same everything else.

    python benchmarks/regression_losses.py --losses mse e_latent_lpips

Pairs: the shipped set, completed as `demo` does, or those of --pairs. Writes docs/results/NAME.json (rows are added to
those there) and docs/images/NAME.png. Run it again to continue.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch

from diffusion2gan.cost.distill import dry_run
from diffusion2gan.demo import complete_shipped_pairs
from diffusion2gan.distill.train import distill
from diffusion2gan.evaluate.run import HELD_OUT_WORLD, evaluate
from diffusion2gan.export import export
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import open_set
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.recipe import LossName, load_recipe
from diffusion2gan.runtime.files import read_json, write_image, write_json
from diffusion2gan.runtime.images import contact_sheet, from_uint8

DOCS = Path(__file__).parent.parent / "docs"
SHOWN = 8


def student(args: argparse.Namespace, loss: str) -> dict[str, Any]:
    """Trains, exports and measures one student."""
    recipe = load_recipe(args.recipe, [f"loss={loss}", *args.set])
    run, out = args.work / loss / "run", args.work / loss / "export"
    distill(recipe, args.pairs, run)
    if not out.exists():
        export(run, out)
    step_s = float(dry_run(recipe, args.pairs)["seconds_per_step"])
    metrics = evaluate(str(out), count=args.count, seed=0, cache=args.work / "pictures")
    return {
        "training_pairs_per_second": recipe.batch_size / step_s,
        **metrics,
        "system": f"student, {loss}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, default=Path("work/pairs"))
    parser.add_argument("--recipe", default="pocket-regression")
    parser.add_argument(
        "--losses", nargs="+", default=["mse", "e_latent_lpips"], choices=get_args(LossName)
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("work/regression_losses"))
    parser.add_argument("--name", default="regression_losses")
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    if args.pairs == Path("work/pairs"):
        complete_shipped_pairs(args.pairs)
    path = DOCS / "results" / f"{args.name}.json"
    result: dict[str, Any] = read_json(path) if path.exists() else {"rows": {}}
    result |= {
        "command": f"python benchmarks/regression_losses.py --recipe {args.recipe} --name {args.name} "
        f"--losses {' '.join(args.losses)} --count {args.count}"
        + (f" --set {' '.join(args.set)}" if args.set else ""),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "gpu": "not measured",
        "pairs": vars(open_set(args.pairs))
        | {"latent_shape": list(open_set(args.pairs).latent_shape)},
        "recipe": load_recipe(args.recipe, args.set).model_dump(exclude={"loss"}),
    }
    for loss in args.losses:
        result["rows"][loss] = student(args, loss)
        write_json(path, result)
    result["rows"]["teacher"] = evaluate(
        "pocket-teacher", count=args.count, seed=0, cache=args.work / "pictures"
    )
    write_json(path, result)

    prompts = scenes.captions(range(SHOWN), HELD_OUT_WORLD)
    systems = [load_system(str(args.work / loss / "export")) for loss in args.losses]
    noise = noise_from_seeds(range(SHOWN), systems[0].latent_shape)
    rows = [
        from_uint8(system.generate(prompts, noise))
        for system in [*systems, load_system("pocket-teacher")]
    ]
    write_image(DOCS / "images" / f"{args.name}.png", contact_sheet(torch.cat(rows), SHOWN).save)
    for name, row in result["rows"].items():
        print(
            f"{name:16} FD {row['frechet_distance']:.4f}  CLIP {row['clip_score']:.3f}  "
            f"attributes {row['attribute_accuracy']:.1%}  same noise {row['same_noise_distance']:.4f}"
        )


if __name__ == "__main__":
    main()
