"""`diffusion2gan compare`, `serve` and `votes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import DeviceOption, PrecisionOption, QuietOption, local_path
from diffusion2gan.errors import UserError


def compare(
    system: Annotated[
        list[str],
        typer.Option(
            help="NAME=PATH, NAME=PATH@STEPS, NAME=ROW=FOLDER for a published system (as in "
            "evaluate), or NAME=FOLDER with images; repeatable."
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            callback=local_path, help="A text file with one prompt per line: the rows of the page."
        ),
    ],
    out: Annotated[
        Path, typer.Option(callback=local_path, help="The folder in which the report is written.")
    ],
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=metrics.json: what evaluate wrote for the system NAME; repeatable."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=255, help="The noise, shared by all systems, depends on it.")
    ] = 255,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "float32",
    quiet: QuietOption = False,
) -> None:
    """Write a page with the images of several systems.

    All systems get the same prompts and the same noise. Run it again to continue an interrupted
    comparison.
    """
    from diffusion2gan.compare import compare as job
    from diffusion2gan.compare.images import parse_names, parse_systems
    from diffusion2gan.prompts import read_prompts

    prompt_list = read_prompts(prompts)
    metrics_files = parse_names(metrics or [], "--metrics")
    names = [argument.partition("=")[0] for argument in system]
    measured = job.read_metrics(metrics_files, names)
    systems = parse_systems(system, device, precision)
    job.compare(systems, prompt_list, out, seed=seed, metrics=measured)
    typer.echo(f"{out / 'index.html'}")


def serve(
    student: Annotated[
        str | None,
        typer.Argument(help="The student to show: pocket-student or a pipeline folder."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A teacher to show beside it: PATH or PATH@STEPS.")
    ] = None,
    vote: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Take blind votes between two systems, A and B, instead."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(callback=local_path, help="With --vote: a text file with a prompt per line."),
    ] = None,
    votes: Annotated[
        Path,
        typer.Option(
            callback=local_path, help="With --vote: the file to which votes are appended."
        ),
    ] = Path("votes.jsonl"),
    history: Annotated[
        Path, typer.Option(callback=local_path, help="The folder for saved images.")
    ] = Path("history"),
    seed: Annotated[
        int, typer.Option(min=0, max=255, help="With --vote: the noise depends on it.")
    ] = 255,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on. Any but the default lets other machines connect."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 uses any free one.")
    ] = 7860,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "float32",
) -> None:
    """Show a student's images in a browser, or take blind votes.

    The page updates the image while the prompt is typed.

    Needs gradio: pip install 'diffusion2gan[demo]'.
    """
    # Exactly one of the two pages
    if (student is None) == (vote is None):
        raise UserError(
            "name a student to show, or two systems to vote on with --vote A B: one of the two"
        )
    if vote is not None and prompts is None:
        raise UserError("--vote needs --prompts: a text file with one prompt per line")

    from diffusion2gan.prompts import read_prompts
    from diffusion2gan.serve import app

    # Serve until interrupted
    if student is not None:
        app.serve_student(
            student,
            teacher,
            host=host,
            port=port,
            history=history,
            device=device,
            precision=precision,
        )
    elif vote is not None and prompts is not None:
        app.serve_vote(
            vote,
            read_prompts(prompts),
            votes,
            host=host,
            port=port,
            seed=seed,
            device=device,
            precision=precision,
        )


def votes(
    file: Annotated[
        Path,
        typer.Argument(callback=local_path, help="The file of votes that `serve --vote` wrote."),
    ],
) -> None:
    """Report which of two systems voters preferred.

    The shares have 95 % intervals.
    """
    from diffusion2gan.serve.votes import summarize

    for line in summarize(file):
        typer.echo(line)
