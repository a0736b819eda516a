"""An ablation of the adversarial loss: students that differ in one component each, several seeds.

    python benchmarks/discriminator.py --pairs-seen 20000 --seeds 0 1 2

Rows, cumulative as in the paper: regression only, + diffusion D, + noise, + R1, + multi-scale,
+ mix-and-match. Two alternatives to the last row: the same D from random weights, and a plain patch
D. A row may also be one or several key=value settings: the complete method with these settings, for
a sweep.

Pairs: the shipped set, completed as `demo` does it, or those of --pairs. Writes
docs/results/NAME.json (rows are added to the existing ones) and docs/images/NAME.png. Run it again
to continue.
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
from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.export import export
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import open_set
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.recipe import Recipe, load_recipe
from diffusion2gan.runtime.files import read_json, write_image, write_json
from diffusion2gan.runtime.images import contact_sheet, from_uint8

DOCS = Path(__file__).parent.parent / "docs"
DEFAULT_PAIRS = Path("work/pairs")
NUM_SHOWN = 8

# D trains from the first pair. To give every row the same initial student: --set init_from=RUN.
NO_REGRESSION_STAGE = ["gan_start_pairs=0"]

# The settings that switch each component off, and the components in the order they are added.
OFF = {
    "noise_input": "false",
    "r1_weight": "0",
    "multi_scale_input": "false",
    "multi_scale_output": "false",
    "mix_share": "0",
}
COMPONENTS = {
    "diffusion": [],
    "noise": ["noise_input"],
    "r1": ["r1_weight"],
    "multi_scale": ["multi_scale_input", "multi_scale_output"],
    "mix_and_match": ["mix_share"],
}
METRICS = ("frechet_distance", "clip_score", "attribute_accuracy", "same_noise_distance")


def row_settings() -> dict[str, list[str]]:
    """The settings of each row, over the recipe's: components that are not added yet are off."""
    table = {"regression": ["adversarial_weight=0"]}
    off = dict(OFF)
    for component, keys in COMPONENTS.items():
        for key in keys:
            del off[key]
        table[f"+ {component}"] = [f"{key}={value}" for key, value in off.items()]
    table["random weights"] = ["discriminator=random"]
    table["patch"] = ["discriminator=patch"]
    return table


def row_name(text: str) -> str:
    """argparse type of a row: a name of the table, or key=value settings."""
    names = row_settings()
    if text not in names and "=" not in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither key=value nor one of {', '.join(names)}"
        )
    return text


def build_recipe(args: argparse.Namespace, row: str, seed: int) -> Recipe:
    """The recipe of a row.

    --set comes first, so that it cannot switch a component of a row on again. At equal compute,
    alternatives with cheaper steps train on more pairs.
    """
    total_pairs = int(args.pairs_seen * args.shares.get(row, 1.0))
    settings = row.split() if "=" in row else row_settings()[row]
    return load_recipe(
        args.recipe,
        [
            *NO_REGRESSION_STAGE,
            *args.set,
            *settings,
            f"total_pairs={total_pairs}",
            f"seed={seed}",
        ],
    )


def row_folder(args: argparse.Namespace, row: str, seed: int) -> Path:
    folder: Path = args.work / row.replace(" ", "_") / str(seed)
    return folder


def train(args: argparse.Namespace, row: str, seed: int) -> Path:
    """Trains and exports one student. Returns the folder that contains `run` and `export`."""
    folder = row_folder(args, row, seed)
    distill(build_recipe(args, row, seed), args.pairs, folder / "run")
    if not (folder / "export").exists():
        export(folder / "run", folder / "export")
    return folder


def measure(args: argparse.Namespace, row: str, folder: Path, seed: int) -> dict[str, Any]:
    """All metrics of one student."""
    metrics = evaluate(
        EvaluateSettings(str(folder / "export"), args.work / "pictures", count=args.count)
    )
    metrics["system"] = f"student, {row}, seed {seed}"
    return {"pairs_seen": build_recipe(args, row, seed).total_pairs, **metrics}


def summarize(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of each metric; no deviation of a single seed."""
    summary = {}
    for metric in METRICS:
        values = [metrics[metric] for metrics in seeds.values()]
        deviation = stdev(values) if len(values) > 1 else None
        summary[metric] = {"mean": mean(values), "std": deviation}
    return summary


def compute_shares(args: argparse.Namespace) -> dict[str, float]:
    """For each alternative, how many times more pairs it trains on at equal compute.

    That is the seconds per step of the last cumulative row divided by its own.
    """
    last_component = list(COMPONENTS)[-1]
    reference = f"+ {last_component}"
    alternatives = ("random weights", "patch")

    step_s = {}
    for row in (reference, *alternatives):
        cost = dry_run(build_recipe(args, row, 0), args.pairs)
        step_s[row] = float(cost["seconds_per_step"])
    return {row: step_s[reference] / step_s[row] for row in alternatives}


def write_figure(args: argparse.Namespace) -> None:
    """Images of eight prompts, the same noise: a line per row (first seed), then the teacher."""
    systems = []
    for row in args.rows:
        folder = row_folder(args, row, args.seeds[0])
        systems.append(load_system(str(folder / "export")))
    systems.append(load_system("pocket-teacher"))

    prompts = scenes.captions(range(NUM_SHOWN), HELD_OUT_WORLD)
    noise = noise_from_seeds(range(NUM_SHOWN), systems[0].latent_shape)
    images = [from_uint8(system.generate(prompts, noise)) for system in systems]
    sheet = contact_sheet(torch.cat(images), NUM_SHOWN)
    write_image(DOCS / "images" / f"{args.name}.png", sheet.save)


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats this measurement, as it is kept in the results."""
    command = (
        f"python benchmarks/discriminator.py --recipe {args.recipe} --name {args.name} "
        f"--pairs-seen {args.pairs_seen} --count {args.count}"
    )
    if args.equal_compute:
        command += " --equal-compute"
    if args.rows != list(row_settings()):
        command += f" --rows {shlex.join(args.rows)}"
    if args.set:
        command += f" --set {' '.join(args.set)}"
    return command


def print_row(row: str, summary: dict[str, Any]) -> None:
    cells = []
    for metric in METRICS:
        cell = f"{metric} {summary[metric]['mean']:.4f}"
        if summary[metric]["std"] is not None:
            cell += f" ± {summary[metric]['std']:.4f}"
        cells.append(cell)
    print(f"{row:16} " + "  ".join(cells))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, default=DEFAULT_PAIRS)
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument(
        "--rows", nargs="+", default=list(row_settings()), type=row_name, metavar="ROW"
    )
    parser.add_argument("--pairs-seen", type=int, default=20_000)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--equal-compute",
        action="store_true",
        help="the alternatives train for the same time, not on the same number of pairs",
    )
    parser.add_argument("--work", type=Path, default=Path("work/discriminator"))
    parser.add_argument("--name", default="discriminator")
    parser.add_argument("--set", nargs="*", default=[])
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.shares = {}
    if args.pairs == DEFAULT_PAIRS:
        complete_shipped_pairs(args.pairs)

    path = DOCS / "results" / f"{args.name}.json"
    result: dict[str, Any] = read_json(path) if path.exists() else {"rows": {}}
    if args.equal_compute:
        # Measured once: a continued run must use the same shares.
        args.shares = result.get("compute_shares") or compute_shares(args)

    # Description of the measurement
    pairs_spec = open_set(args.pairs)
    result["command"] = command_line(args)
    result["device"] = f"CPU, {torch.get_num_threads()} threads"
    result["pairs"] = {**vars(pairs_spec), "latent_shape": list(pairs_spec.latent_shape)}
    result["recipe"] = load_recipe(args.recipe, [*NO_REGRESSION_STAGE, *args.set]).model_dump()
    result["settings"] = row_settings()
    result["compute_shares"] = args.shares
    write_json(path, result)

    # Seed by seed, so that a table with one seed is complete first
    for seed in args.seeds:
        for row in args.rows:
            folder = train(args, row, seed)
            entry = result["rows"].setdefault(row, {"seeds": {}})
            entry["seeds"][str(seed)] = measure(args, row, folder, seed)
            entry.update(summarize(entry["seeds"]))
            write_json(path, result)
    result["rows"]["teacher"] = evaluate(
        EvaluateSettings("pocket-teacher", args.work / "pictures", count=args.count)
    )
    write_json(path, result)

    write_figure(args)
    for row in args.rows:
        print_row(row, result["rows"][row])


if __name__ == "__main__":
    main()
