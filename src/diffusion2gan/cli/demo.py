"""`diffusion2gan demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import QuietOption, SetOption, local_path


def demo(
    out: Annotated[
        Path, typer.Option(callback=local_path, help="The folder for all files of the demo.")
    ] = Path("demo"),
    count: Annotated[
        int, typer.Option(min=2, help="Number of held-out captions for the metrics.")
    ] = 256,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Number of prompts (rows) in the report.")
    ] = 12,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run every stage on the embedded teacher.

    The stages are pairs, distill, export, evaluate and compare. They take about ten minutes on
    two cores. Run it again to continue an interrupted demo.
    """
    from diffusion2gan.demo import demo as job

    job(out, count=count, num_prompts=num_prompts, settings=set_ or [])
