"""`diffusion2gan recipe list` and `recipe show`."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

recipe_app = typer.Typer(
    help="List the shipped recipes, or show the settings of one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@recipe_app.command("list")
def recipe_list() -> None:
    """List the shipped recipes with their teachers and hardware."""
    from diffusion2gan.recipe import shipped_recipes, summarize_recipe

    for name in shipped_recipes():
        summary = summarize_recipe(name)
        typer.echo(name)
        typer.echo(f"    {summary.description}")
        typer.echo(f"    teacher: {summary.teacher}; hardware: {summary.hardware}")
    typer.echo("\nTo see every setting of a recipe: diffusion2gan recipe show NAME")


@recipe_app.command("show")
def recipe_show(
    name: Annotated[
        str | None,
        typer.Argument(help="A shipped recipe or a .toml file; the defaults if not given."),
    ] = None,
) -> None:
    """Show every setting with its value, default and description.

    Settings that the recipe changes are marked with *. To change one for a run, use
    `diffusion2gan distill RECIPE --set key=value`.
    """
    from diffusion2gan.recipe import Recipe, load_recipe

    defaults = Recipe()
    recipe = defaults if name is None else load_recipe(name)

    for key, field in Recipe.model_fields.items():
        value, default = getattr(recipe, key), getattr(defaults, key)
        if value != default:
            typer.echo(f"* {key} = {_format(value)}  (default: {_format(default)})")
        else:
            typer.echo(f"  {key} = {_format(value)}")

        description = field.description or ""
        if get_origin(field.annotation) is Literal:
            description += f" (one of {', '.join(get_args(field.annotation))})"
        if description:
            typer.echo(textwrap.indent(textwrap.fill(description.strip(), 74), " " * 6))


def _format(value: Any) -> str:
    """A setting's value as it is written in a recipe file."""
    if value is None:
        return "not set"
    return json.dumps(value, ensure_ascii=False)
