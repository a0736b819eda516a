"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from diffusion2gan.errors import UserError

TAKE_URLS = "distill --pairs, pairs --out, pairs import --out, and the sets of pairs info, verify, merge and export"
TeacherOption = Annotated[
    str, typer.Option(help="`pocket`, the folder of a diffusers pipeline, or a .safetensors.")
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, …; under torchrun cuda is the rank's own.")
]
TeacherConfigOption = Annotated[str | None, typer.Option(help="A single file's pipeline folder.")]
TeacherLoraOption = Annotated[
    str | None, typer.Option(help="LoRAs to merge: PATH[@SCALE], commas between.")
]
VaeOption = Annotated[
    str | None, typer.Option(help="Another VAE for the same latents: its folder.")
]
ResolutionOption = Annotated[
    int | None, typer.Option(min=1, help="The pictures' side, if not the teacher's own.")
]
PrecisionOption = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option(help="The systems'.")
]
PriceOption = Annotated[
    float | None, typer.Option(min=0.0, help="With --dry-run: money, in whatever it is in.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="A recipe's setting, key=value; repeatable.")
]


def here(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path as it is. Raises UserError where it was a URL: `Path` would quietly make a folder `s3:` of it."""
    if path is not None and (url := re.match(r"(\w[\w+.-]+:)/(.*)", str(path))):
        named = (
            parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
        )
        raise UserError(
            f"{named} {url[1]}//{url[2]} is a URL, and this must be a path on this machine. Name a local one, and "
            f"copy it from or to the store with the store's own tool. A URL is taken by {TAKE_URLS}."
        )
    return path
