"""`diffusion2gan pocket …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import local_path

pocket_app = typer.Typer(help="The embedded world.", no_args_is_help=True, rich_markup_mode=None)


@pocket_app.command("triplets")
def pocket_triplets(
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder of the triplets.")],
    count: Annotated[int, typer.Option(min=1, help="Triplets a sub-set.")] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write graded distortions of scenes in BAPPS's layout. The judgements are the grades', not people's."""
    from diffusion2gan.pocket.triplets import write_triplets

    write_triplets(out, count, seed)
    typer.echo(
        f"{out}: {count} triplets a sub-set. Next: diffusion2gan perceptual calibrate --triplets {out} "
        "--network pocket --vae pocket --out NAME"
    )


@pocket_app.command("train")
def pocket_train(
    out: Annotated[
        Path,
        typer.Option(
            callback=local_path, help="Checkpoints, and in out/weights the finished models."
        ),
    ] = Path("pocket"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[
        float, typer.Option(min=0.0001, help="Multiplies the pictures each stage sees.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Train every pocket model from nothing; run again to continue."""
    from diffusion2gan.pocket.train import train

    train(out, seed=seed, scale=scale, device=device)
