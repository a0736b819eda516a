"""`diffusion2gan perceptual …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import local_path
from diffusion2gan.errors import UserError

perceptual_app = typer.Typer(
    help="Networks for the perceptual losses.", no_args_is_help=True, rich_markup_mode=None
)


@perceptual_app.command("fit")
def perceptual_fit(
    images: Annotated[
        Path,
        typer.Option(
            callback=local_path,
            help="Class folders, IMAGES/<class>/*.png, or a Hugging Face dataset.",
        ),
    ],
    out: Annotated[Path, typer.Option(callback=local_path, help="The network's folder.")],
    vae: Annotated[
        str | None, typer.Option(help="`pocket`, the folder of a VAE or of a pipeline with one.")
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="The pixel twin: no VAE, three channels.")
    ] = False,
    widths: Annotated[
        str, typer.Option(help="Channels of the five stages.")
    ] = "64,128,256,512,512",
    size: Annotated[int, typer.Option(min=1, help="The pictures' side.")] = 256,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Train a feature network on the latents of labelled pictures; run again to continue. torchrun shares the work."""
    if pixels == (vae is not None):
        raise UserError(
            "name the VAE whose latents are meant with --vae, or ask for --pixels: one of the two"
        )
    if not all(width.strip().isdigit() and int(width) > 0 for width in widths.split(",")):
        raise UserError(f"--widths {widths!r}: write five numbers, as in 64,128,256,512,512")
    from diffusion2gan.perceptual.fit import fit

    numbers = tuple(int(width) for width in widths.split(","))
    result = fit(images, out, vae, numbers, size, epochs, batch_size, seed=seed, device=device)
    if result is not None:
        typer.echo(
            f"{out}: top-1 {result['top1']:.2%} on {result['held_out']} held-out pictures, {len(result['unreadable'])} "
            f"unreadable. Next: diffusion2gan perceptual calibrate --triplets FOLDER --network {out} --out NAME"
        )


@perceptual_app.command("calibrate")
def perceptual_calibrate(
    triplets: Annotated[
        Path,
        typer.Option(
            callback=local_path, help="BAPPS's layout: FOLDER/<subset>/ref, p0, p1, judge."
        ),
    ],
    network: Annotated[str, typer.Option(help="`pocket` or a network's folder.")],
    out: Annotated[
        Path, typer.Option(callback=local_path, help="The calibrated network's folder.")
    ],
    vae: Annotated[
        str | None, typer.Option(help="A latent network's VAE; none for a pixel network.")
    ] = None,
    scored: Annotated[
        Path | None,
        typer.Option(
            callback=local_path, help="Triplets to score on; a held-out tenth if not given."
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="The patches' side.")] = 64,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Fit a network's heads to two-alternative forced choices; run again to continue."""
    from diffusion2gan.perceptual.calibrate import calibrate

    result = calibrate(
        triplets, network, out, vae, scored, size, epochs, learning_rate, seed, device
    )
    for name, row in result.items():
        typer.echo(
            f"{name}: 2AFC {row['after']:.2%} (before: {row['before']:.2%}), {row['count']} triplets"
        )


@perceptual_app.command("import")
def perceptual_import(
    file: Annotated[Path, typer.Argument(callback=local_path, help="The published checkpoint.")],
    format_: Annotated[str, typer.Option("--format", help="elatentlpips or snu.")],
    out: Annotated[Path, typer.Option(callback=local_path, help="The network's folder.")],
) -> None:
    """Turn published weights into a network of ours, with the settings that reproduce their formula."""
    from diffusion2gan.perceptual.importers import import_network

    for line in import_network(file, format_, out):
        typer.echo(line)
