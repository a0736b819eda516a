"""What each piece of the adversarial loss buys: students that differ in it alone, several seeds each.

    python benchmarks/discriminator.py --pairs-seen 20000 --seeds 0 1 2

Rows, cumulative as in the paper: regression only, + diffusion D, + noise, + R1, + multi-scale, + mix-and-match; and two
alternatives to the last: the same D from random weights, and a plain patch D. A row named key=value, or several of
them, is the whole method with these settings: a sweep. Pairs: the shipped set, completed as `demo` does, or those of
--pairs. Writes docs/results/NAME.json (rows are added to those there) and docs/images/NAME.png. Run it again to
continue.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from statistics import mean, stdev
from typing import Any

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
from diffusion2gan.recipe import Recipe, load_recipe
from diffusion2gan.runtime.files import read_json, write_image, write_json
from diffusion2gan.runtime.images import contact_sheet, from_uint8

DOCS = Path(__file__).parent.parent / "docs"
SHOWN = 8
FROM_BIRTH = [
    "gan_start_pairs=0"
]  # D plays all along; --set init_from=RUN gives every row the same student to begin with
OFF = {
    "noise_input": "false",
    "r1_weight": "0",
    "multi_scale_input": "false",
    "multi_scale_output": "false",
    "mix_share": "0",
}
PIECES = {
    "diffusion": [],
    "noise": ["noise_input"],
    "r1": ["r1_weight"],
    "multi_scale": ["multi_scale_input", "multi_scale_output"],
    "mix_and_match": ["mix_share"],
}
MEASURED = ("frechet_distance", "clip_score", "attribute_accuracy", "same_noise_distance")


def rows() -> dict[str, list[str]]:
    """Each row's settings over the recipe's: what is not added yet is off."""
    table, off = {"regression": ["adversarial_weight=0"]}, dict(OFF)
    for name, pieces in PIECES.items():
        for piece in pieces:
            del off[piece]
        table[f"+ {name}"] = [f"{key}={value}" for key, value in off.items()]
    return table | {"random weights": ["discriminator=random"], "patch": ["discriminator=patch"]}


def row(name: str) -> str:
    """A row's name, as argparse takes it."""
    if name not in rows() and "=" not in name:
        raise argparse.ArgumentTypeError(
            f"{name!r} is neither key=value nor one of {', '.join(rows())}"
        )
    return name


def train(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Trains and exports one student; returns the folder, `export` and `run` in it."""
    folder: Path = args.work / name.replace(" ", "_") / str(seed)
    distill(recipe_of(args, name, seed), args.pairs, folder / "run")
    if not (folder / "export").exists():
        export(folder / "run", folder / "export")
    return folder


def recipe_of(args: argparse.Namespace, name: str, seed: int) -> Recipe:
    """--set comes first: no row may be switched on again by it. At equal compute, a row sees fewer pairs."""
    pairs_seen = int(args.pairs_seen * args.shares.get(name, 1.0))
    settings = name.split() if "=" in name else rows()[name]
    return load_recipe(
        args.recipe,
        [*FROM_BIRTH, *args.set, *settings, f"total_pairs={pairs_seen}", f"seed={seed}"],
    )


def measure(args: argparse.Namespace, name: str, folder: Path, seed: int) -> dict[str, Any]:
    recipe = recipe_of(args, name, seed)
    metrics = evaluate(
        str(folder / "export"), count=args.count, seed=0, cache=args.work / "pictures"
    )
    return {"pairs_seen": recipe.total_pairs, "system": f"student, {name}, seed {seed}"} | {
        key: value for key, value in metrics.items() if key != "system"
    }


def summary(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds (None of a single one) of each measure."""
    values = {key: [row[key] for row in seeds.values()] for key in MEASURED}
    return {
        key: {"mean": mean(v), "std": stdev(v) if len(v) > 1 else None} for key, v in values.items()
    }


def compute_shares(args: argparse.Namespace) -> dict[str, float]:
    """For the alternatives, the last cumulative row's seconds a step over theirs: more pairs where steps are cheap."""
    last = list(PIECES)[-1]
    names = (f"+ {last}", "random weights", "patch")
    steps_s = {
        n: float(dry_run(recipe_of(args, n, 0), args.pairs)["seconds_per_step"]) for n in names
    }
    return {name: steps_s[names[0]] / steps_s[name] for name in names[1:]}


def figure(args: argparse.Namespace, folders: list[Path]) -> None:
    """Eight prompts of each row's first seed and, in the last row, the teacher, from the same noises."""
    prompts = scenes.captions(range(SHOWN), HELD_OUT_WORLD)
    systems = [load_system(str(folder / "export")) for folder in folders] + [
        load_system("pocket-teacher")
    ]
    noise = noise_from_seeds(range(SHOWN), systems[0].latent_shape)
    pictures = [from_uint8(system.generate(prompts, noise)) for system in systems]
    write_image(
        DOCS / "images" / f"{args.name}.png", contact_sheet(torch.cat(pictures), SHOWN).save
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=Path("work/pairs"))
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument("--rows", nargs="+", default=list(rows()), type=row, metavar="ROW")
    parser.add_argument("--pairs-seen", type=int, default=20_000)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--equal-compute",
        action="store_true",
        help="the alternatives train as long, not as many pairs",
    )
    parser.add_argument("--work", type=Path, default=Path("work/discriminator"))
    parser.add_argument("--name", default="discriminator")
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    args.shares = {}
    if args.pairs == Path("work/pairs"):
        complete_shipped_pairs(args.pairs)
    path = DOCS / "results" / f"{args.name}.json"
    result: dict[str, Any] = read_json(path) if path.exists() else {"rows": {}}
    if args.equal_compute:
        args.shares = result.get("compute_shares") or compute_shares(
            args
        )  # once: a resumed run must repeat it
    result |= {
        "command": f"python benchmarks/discriminator.py --recipe {args.recipe} --name {args.name} --pairs-seen "
        f"{args.pairs_seen} --count {args.count}"
        + " --equal-compute" * args.equal_compute
        + ("" if args.rows == list(rows()) else f" --rows {shlex.join(args.rows)}")
        + (f" --set {' '.join(args.set)}" if args.set else ""),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "pairs": vars(open_set(args.pairs))
        | {"latent_shape": list(open_set(args.pairs).latent_shape)},
        "recipe": load_recipe(args.recipe, [*FROM_BIRTH, *args.set]).model_dump(),
        "settings": rows(),
        "compute_shares": args.shares,
    }
    write_json(path, result)
    for seed in args.seeds:  # seed by seed: one whole table first
        for name in args.rows:
            folder = train(args, name, seed)
            found = result["rows"].setdefault(name, {"seeds": {}})
            found["seeds"][str(seed)] = measure(args, name, folder, seed)
            found |= summary(found["seeds"])
            write_json(path, result)
    result["rows"]["teacher"] = evaluate(
        "pocket-teacher", count=args.count, seed=0, cache=args.work / "pictures"
    )
    write_json(path, result)
    figure(args, [args.work / name.replace(" ", "_") / str(args.seeds[0]) for name in args.rows])
    for name in args.rows:
        found = result["rows"][name]
        deviations = {
            key: f" ± {found[key]['std']:.4f}" if found[key]["std"] is not None else ""
            for key in MEASURED
        }
        print(
            f"{name:16} "
            + "  ".join(f"{key} {found[key]['mean']:.4f}{deviations[key]}" for key in MEASURED)
        )


if __name__ == "__main__":
    main()
