"""`diffusion2gan distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import PriceOption, QuietOption, SetOption, local_path


def distill(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A shipped recipe or a .toml file. `diffusion2gan recipe list` lists the shipped "
            "ones, `diffusion2gan recipe show NAME` shows every setting of one."
        ),
    ],
    pairs: Annotated[str, typer.Option(help="The pairs to learn from: a folder or a URL.")],
    out: Annotated[Path, typer.Option(callback=local_path, help="The run's folder.")],
    set_: SetOption = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting that may differ from the run's, because it changes the result by "
            "rounding alone: gradient_accumulation_steps, device, …; repeatable."
        ),
    ] = None,
    sample_prompts: Annotated[
        Path | None,
        typer.Option(
            callback=local_path,
            help="A text file with one prompt per line (at most 64): sampled too, and shown on the "
            "run's page.",
        ),
    ] = None,
    tracker: Annotated[
        str | None,
        typer.Option(
            help="Also log to these, separated by commas: tensorboard, wandb, trackio. Each needs "
            "the extra of its name."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe and the cost, train nothing.")
    ] = False,
    price_per_gpu_hour: PriceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train a one-step student; run again to resume exactly."""
    from diffusion2gan.recipe import Recipe, load_recipe

    # Wrong settings are reported before the slow imports
    loaded = load_recipe(recipe, set_ or [])

    from diffusion2gan.cost.distill import dry_run as estimate_cost
    from diffusion2gan.distill import train
    from diffusion2gan.distill.trackers import check_trackers
    from diffusion2gan.prompts import read_prompts
    from diffusion2gan.runtime.distributed import get_ranks
    from diffusion2gan.runtime.storage import parse_location

    # Settings that differ from the defaults; `recipe show` prints all of them
    is_main = get_ranks().is_main
    if is_main and not quiet:
        for key, (value, _) in loaded.changed(Recipe()).items():
            typer.echo(f"{key} = {value!r}")

    trackers = [name.strip() for name in tracker.split(",")] if tracker else []
    check_trackers(trackers)
    prompts = read_prompts(sample_prompts) if sample_prompts is not None else []
    location = parse_location(pairs)
    if dry_run:
        for key, value in estimate_cost(loaded, location, price_per_gpu_hour).items():
            typer.echo(f"{key}: {value}")
        return

    train.distill(loaded, location, out, allow_change or [], prompts, trackers)
    if is_main:
        typer.echo(
            f"{out}: {loaded.total_pairs} pairs seen. "
            f"Next: diffusion2gan export {out} --out export/NAME"
        )
