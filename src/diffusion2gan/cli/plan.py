"""`diffusion2gan plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffusion2gan.cli.options import SetOption


def plan(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (see `recipe list`) or a .toml file.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(help="The GPU: a100, h100 or h200.")] = "h100",
    model: Annotated[
        str | None,
        typer.Option(help="sd15 or sdxl, if the recipe's teacher has another name."),
    ] = None,
    num_pairs: Annotated[
        float, typer.Option(min=1.0, help="How many pairs to make, for example 3e6.")
    ] = 3e6,
    dollars_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Price of one GPU hour.")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Estimate the cost of pairs and training on many GPUs.

    Nothing is run or measured: this is arithmetic on published and assumed figures, listed in
    docs/scale.md.
    """
    from diffusion2gan.cost import plan as job
    from diffusion2gan.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if model is None:
        model_name, reason = job.choose_model(loaded)
    else:
        model_name, reason = model, "--model"

    # `plan` chooses the number of micro-batches, unless the user sets it: the recipe's number was
    # chosen for another number of GPUs.
    accumulation_given = "gradient_accumulation_steps" in _setting_names(set_ or [])
    accumulation_steps = loaded.gradient_accumulation_steps if accumulation_given else None

    stages = job.plan(
        model_name,
        gpu,
        gpus,
        num_pairs,
        loaded,
        dollars_per_hour,
        accumulation_steps,
    )

    # Report
    if accumulation_given:
        choice = "--set"
    elif stages["distill"]["fits"]:
        choice = (
            "the fewest micro-batches that fit in memory; "
            f"the recipe has {loaded.gradient_accumulation_steps}"
        )
    else:
        choice = (
            "nothing fits in memory, so one pair per micro-batch; "
            f"the recipe has {loaded.gradient_accumulation_steps}"
        )
    typer.echo(f"model: {model_name} ({reason})")
    chosen_steps = stages["distill"]["gradient_accumulation_steps"]
    typer.echo(f"gradient_accumulation_steps: {chosen_steps} ({choice})")
    for stage, figures in stages.items():
        for name, value in figures.items():
            typer.echo(f"{stage}.{name}: {_format(value)}")


def _setting_names(settings: list[str]) -> set[str]:
    """The names in `--set name=value` options."""
    return {setting.partition("=")[0].strip() for setting in settings}


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
