"""`diffusion2gan distill` and `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import PriceOption, SetOption, here


def distill(
    recipe: Annotated[
        str, typer.Argument(help="A .toml file or a shipped recipe: pocket, pocket-demo, sd15, …")
    ],
    pairs: Annotated[str, typer.Option(help="The pairs to learn from: a folder or a URL.")],
    out: Annotated[Path, typer.Option(callback=here, help="The run's folder.")],
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


def plan(
    recipe: Annotated[str, typer.Argument(help="A .toml file or a shipped recipe.")],
    gpus: Annotated[int, typer.Option(min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200.")] = "h100",
    model: Annotated[
        str | None, typer.Option(help="sd15 or sdxl, if not what the recipe's teacher names.")
    ] = None,
    num_pairs: Annotated[float, typer.Option(min=1.0, help="As 3e6.")] = 3e6,
    dollars_per_hour: Annotated[float | None, typer.Option(min=0.0, help="Of one GPU.")] = None,
    set_: SetOption = None,
) -> None:
    """Estimate pairs and training on many GPUs, by arithmetic on stated inputs (docs/scale.md)."""
    from diffusion2gan.cost import plan as job
    from diffusion2gan.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    name, why = (model, "--model") if model else job.model_of(loaded)
    is_set = any(
        setting.partition("=")[0].strip() == "gradient_accumulation_steps" for setting in set_ or []
    )
    stages = job.plan(
        name,
        gpu,
        gpus,
        num_pairs,
        loaded,
        dollars_per_hour,
        loaded.gradient_accumulation_steps if is_set else None,
    )
    parts, fits = stages["distill"]["gradient_accumulation_steps"], stages["distill"]["fits"]
    chosen = "the fewest parts that fit" if fits else "nothing fits, so one pair a part"
    typer.echo(f"model: {name} ({why})")
    typer.echo(
        f"gradient_accumulation_steps: {parts} ({'--set' if is_set else f'{chosen}; the recipe has {loaded.gradient_accumulation_steps}'})"
    )
    for stage, numbers in stages.items():
        for key, value in numbers.items():
            typer.echo(
                f"{stage}.{key}: {value:.4g}"
                if isinstance(value, float)
                else f"{stage}.{key}: {value}"
            )
