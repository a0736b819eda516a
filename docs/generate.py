"""MkDocs hook: fills the reference pages from the code when the site is built.

A page holds a marker on a line of its own, `<!-- generated: NAME -->`; `SECTIONS` maps each name to
the function that writes the Markdown put in its place. These tables are not written by hand and
cannot differ from the commands and settings.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import typer

from diffusion2gan.cli import app
from diffusion2gan.recipe import SHIPPED, Recipe, load_recipe

# The commands as they are used; all others follow in the order of their definition.
ORDER = ("pairs", "distill", "export", "generate", "evaluate", "compare", "serve", "votes", "demo")
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with every page's text. Raises KeyError at an unknown section name."""
    return MARKER.sub(lambda match: SECTIONS[match[1]](), markdown)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; `|` and line breaks in cells are escaped."""
    lines = []
    for row in [header, ["---"] * len(header), *rows]:
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Command line


def commands(command: Any, name: str = "diffusion2gan") -> Iterator[tuple[str, Any]]:
    """The program and every command that can be called, with its full name; groups come first."""
    children = getattr(command, "commands", {})
    if not children or command.invoke_without_command or name == "diffusion2gan":
        yield name, command
    for child in sorted(children, key=pipeline_order):
        yield from commands(children[child], f"{name} {child}")


def pipeline_order(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def command_reference() -> str:
    sections = []
    for name, command in commands(typer.main.get_command(app)):
        sections += [f"## {name}", command_help(command)]

        # One table for the arguments, one for the options
        arguments, options = [], []
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                arguments.append(argument_row(parameter))
            elif parameter.name != "help":
                options.append(option_row(parameter))

        if arguments:
            sections.append(table(["argument", "meaning"], arguments))
        if options:
            sections.append(table(["option", "default", "meaning"], options))
    return "\n\n".join(sections)


def command_help(command: Any) -> str:
    """The help text. A group that can be called, as `pairs`, has it in its callback's docstring."""
    text = command.help or ""
    if getattr(command, "commands", {}) and command.callback is not None:
        text = command.callback.__doc__ or text
    return escape(inspect.cleandoc(text))


def argument_row(parameter: Any) -> list[str]:
    note = "" if parameter.required else " (optional)"
    return [f"`{parameter.name.upper()}`{note}", escape(parameter.help or "")]


def option_row(parameter: Any) -> list[str]:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.required:
        default = "required"
    elif parameter.default is None or callable(parameter.default):
        default = ""
    elif parameter.is_flag and not parameter.secondary_opts:
        default = "off"
    elif isinstance(parameter.default, bool):
        default = f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    else:
        default = f"`{parameter.default}`"
    return [names, default, f"{value_type(parameter)}{escape(parameter.help or '')}"]


def value_type(parameter: Any) -> str:
    """The choices or the range of an option's value, in front of its meaning."""
    annotation = parameter.type_descriptor.annotation
    if typing.get_origin(annotation) is typing.Literal:
        choices = typing.get_args(annotation)
        return "One of " + ", ".join(f"`{choice}`" for choice in choices) + ". "
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is not None and high is not None:
        return f"From {low} to {high}. "
    return f"At least {low}. " if low is not None else ""


def escape(text: str) -> str:
    """Help texts are plain text: no HTML and no emphasis may arise from them."""
    return text.replace("<", "&lt;").replace("*", "\\*")


# Recipes


def setting_reference() -> str:
    rows = []
    for name, field in Recipe.model_fields.items():
        limits = [constraint_text(item) for item in field.metadata]
        values = " ".join([annotation_text(field.annotation), *filter(None, limits)])
        rows.append([f"`{name}`", values, default_text(field.default), field.description or ""])
    return table(["setting", "values", "default", "meaning"], rows)


def annotation_text(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(annotation_text(part) for part in typing.get_args(annotation))
    return "none" if annotation is type(None) else annotation.__name__


def constraint_text(constraint: Any) -> str:
    limits = []
    for name, symbol in (("ge", "≥"), ("gt", "&gt;"), ("le", "≤"), ("lt", "&lt;")):
        if getattr(constraint, name, None) is not None:
            limits.append(f"{symbol} {getattr(constraint, name)}")
    return " ".join(limits)


def default_text(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def recipe_reference() -> str:
    """Each shipped recipe as its file: the comment says pairs, hardware and what is measured."""
    sections = []
    for path in sorted(SHIPPED.glob("*.toml")):
        load_recipe(path.stem)
        sections += [f"### {path.stem}", f"```toml\n{path.read_text('utf-8').strip()}\n```"]
    return "\n\n".join(sections)


SECTIONS: dict[str, Callable[[], str]] = {
    "commands": command_reference,
    "settings": setting_reference,
    "recipes": recipe_reference,
}
