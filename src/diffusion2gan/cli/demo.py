"""`diffusion2gan demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import SetOption, local_path


def demo(
    out: Annotated[
        Path, typer.Option(callback=local_path, help="The folder for everything it makes.")
    ] = Path("demo"),
    count: Annotated[int, typer.Option(min=2, help="Held-out captions to measure on.")] = 256,
    num_prompts: Annotated[int, typer.Option(min=1, help="Rows of the report.")] = 12,
    set_: SetOption = None,
) -> None:
    """All of it on the embedded teacher: pairs, distill, export, evaluate, compare. About ten minutes on two cores."""
    from diffusion2gan.demo import demo as job

    job(out, count=count, num_prompts=num_prompts, settings=set_ or [])
