"""`diffusion2gan compare`, `serve` and `votes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion2gan.cli.options import DeviceOption, PrecisionOption, local_path
from diffusion2gan.errors import UserError


def compare(
    system: Annotated[
        list[str],
        typer.Option(
            help="NAME=PATH, NAME=PATH@STEPS, NAME=ROW=FOLDER (as evaluate's) or NAME=PICTURES; repeatable."
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(callback=local_path, help="A text file, one prompt a line, one row each."),
    ],
    out: Annotated[Path, typer.Option(callback=local_path, help="The report's folder.")],
    metrics: Annotated[
        list[str] | None, typer.Option(help="NAME=metrics.json, from evaluate; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=255)] = 255,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "float32",
) -> None:
    """Write a page with several systems' pictures of the same prompts from the same noises; run again to continue."""
    from diffusion2gan.compare import compare as job
    from diffusion2gan.compare.images import parse_names, parse_systems
    from diffusion2gan.prompts import read_prompts

    lines = read_prompts(prompts)
    named = parse_names(metrics or [], "--metrics")
    measured = job.read_metrics(named, [text.partition("=")[0] for text in system])
    job.compare(parse_systems(system, device, precision), lines, out, seed=seed, metrics=measured)
    typer.echo(f"{out / 'index.html'}")


def serve(
    student: Annotated[
        str | None, typer.Argument(help="pocket-student, pocket-teacher or a pipeline folder.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A teacher to show beside it, PATH or PATH@STEPS.")
    ] = None,
    vote: Annotated[
        tuple[str, str] | None, typer.Option(help="Blind votes between two systems, A B, instead.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(callback=local_path, help="With --vote: a text file, one prompt a line."),
    ] = None,
    votes: Annotated[
        Path,
        typer.Option(callback=local_path, help="With --vote: the file that votes are added to."),
    ] = Path("votes.jsonl"),
    history: Annotated[
        Path, typer.Option(callback=local_path, help="Where kept pictures go.")
    ] = Path("history"),
    seed: Annotated[int, typer.Option(min=0, max=255, help="With --vote: the noises' set.")] = 255,
    host: Annotated[
        str, typer.Option(help="Another address than this lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 7860,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "float32",
) -> None:
    """Show a student's picture as its prompt is typed, or take blind votes, in a browser (needs the demo extra)."""
    if (student is None) == (vote is None):
        raise UserError(
            "name a student to show, or two systems to vote on with --vote A B: one of the two"
        )
    if vote is not None and prompts is None:
        raise UserError("--vote needs --prompts: a text file, one prompt a line")
    from diffusion2gan.prompts import read_prompts
    from diffusion2gan.serve import app as job

    place: dict[str, Any] = {"host": host, "port": port, "device": device, "precision": precision}
    if vote is not None and prompts is not None:
        job.serve_vote(vote, read_prompts(prompts), votes, seed=seed, **place)
    elif student is not None:
        job.serve_student(student, teacher, history=history, **place)


def votes(
    file: Annotated[
        Path, typer.Argument(callback=local_path, help="What `serve --vote` has written.")
    ],
) -> None:
    """Which of two systems voters preferred, with a 95 % interval."""
    from diffusion2gan.serve.votes import summary

    for line in summary(file):
        typer.echo(line)
