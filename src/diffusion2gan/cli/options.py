"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffusion2gan.errors import UserError

TAKE_URLS = (
    "distill --pairs, pairs --out, pairs import --out, and the pairs commands info, verify, "
    "merge and export"
)

TeacherOption = Annotated[
    str, typer.Option(help="`pocket`, the folder of a diffusers pipeline, or a .safetensors file.")
]
TeacherConfigOption = Annotated[
    str | None, typer.Option(help="The pipeline folder that belongs to a single-file teacher.")
]
TeacherLoraOption = Annotated[
    str | None,
    typer.Option(help="LoRAs merged into the teacher: PATH[@SCALE], separated by commas."),
]
VaeOption = Annotated[
    str | None, typer.Option(help="The folder of another VAE for the same latents.")
]
ResolutionOption = Annotated[
    int | None, typer.Option(min=1, help="The side of the images, if not the teacher's default.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, …, or auto: cuda if there is a GPU, otherwise cpu. Under "
        "torchrun, cuda is the GPU of each rank."
    ),
]
PrecisionOption = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option(help="The precision of the weights.")
]
PriceOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="With --dry-run: price of a GPU hour, in any currency."),
]


def hide_progress(requested: bool) -> bool:
    """Option callback: `--quiet`."""
    if requested:
        from diffusion2gan.runtime import progress

        progress.hide_progress()
    return requested


QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        callback=hide_progress,
        help="No progress bar and no settings; results, warnings and errors are printed.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the recipe: key=value; repeatable."),
]


def local_path(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Option callback: returns the path, with `~` for the home folder expanded.

    The shell does not expand it in `--out=~/x`.

    Raises UserError if it was a URL: `Path("s3://bucket/x")` would silently name a local folder
    `s3:`.
    """
    if path is None:
        return None

    url = re.match(r"(\w[\w+.-]+:)/(.*)", str(path))
    if url is None:
        return path.expanduser()

    name = parameter.opts[0]
    if not name.startswith("-"):
        name = name.upper()
    raise UserError(
        f"{name} {url[1]}//{url[2]} is a URL, but this must be a path on this machine. Use a local "
        "path and copy the files from or to the store with the store's own tool. URLs are "
        f"accepted by {TAKE_URLS}."
    )


def local_paths(parameter: typer.CallbackParam, paths: list[Path]) -> list[Path]:
    """As `local_path`, for an option or argument that takes several paths."""
    return [local_path(parameter, path) or path for path in paths]
