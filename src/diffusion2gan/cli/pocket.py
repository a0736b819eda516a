"""`diffusion2gan pocket …`: triplets and models of the pocket world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import DeviceOption, QuietOption, local_path

pocket_app = typer.Typer(
    help="Write triplets of the pocket world, or train its models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@pocket_app.command("triplets")
def pocket_triplets(
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder of the triplets.")],
    count: Annotated[int, typer.Option(min=1, help="Triplets per subset.")] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write graded distortions of scenes in the layout of BAPPS.

    The judgements follow from the grades; they are not human judgements.
    """
    from diffusion2gan.pocket.triplets import write_triplets

    write_triplets(out, count, seed)
    typer.echo(
        f"{out}: {count} triplets per subset. Next: diffusion2gan perceptual calibrate "
        f"--triplets {out} --network pocket --vae pocket --out NAME"
    )


@pocket_app.command("train")
def pocket_train(
    out: Annotated[
        Path,
        typer.Option(
            callback=local_path, help="Folder of the checkpoints; finished models in OUT/weights."
        ),
    ] = Path("pocket"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[
        float,
        typer.Option(min=0.0001, max=10_000, help="Factor of the number of images per stage."),
    ] = 1.0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Train every pocket model from scratch.

    Run the same command again to resume.
    """
    from diffusion2gan.pocket.train import train

    train(out, seed=seed, scale=scale, device=device)
