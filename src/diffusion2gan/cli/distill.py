"""`diffusion2gan distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import PriceOption, SetOption, local_path


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
            help="A harmless setting that may differ from the run's, as gradient_accumulation_steps."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe and the cost, train nothing.")
    ] = False,
    price_per_gpu_hour: PriceOption = None,
) -> None:
    """Train a one-step student; run again to resume exactly."""
    from diffusion2gan.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    from diffusion2gan.distill import train
    from diffusion2gan.runtime.distributed import get_ranks
    from diffusion2gan.runtime.storage import parse_location

    for key, value in loaded.model_dump().items() if get_ranks().is_main else ():
        typer.echo(f"{key} = {value!r}")

    if dry_run:
        from diffusion2gan.cost.distill import dry_run as dry_run_cost

        for key, value in dry_run_cost(loaded, parse_location(pairs), price_per_gpu_hour).items():
            typer.echo(f"{key}: {value}")
        return
    train.distill(loaded, parse_location(pairs), out, allow_change or [])
    if get_ranks().is_main:
        typer.echo(
            f"{out}: {loaded.total_pairs} pairs seen. Next: diffusion2gan export {out} --out export/NAME"
        )
