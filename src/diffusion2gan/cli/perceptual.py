"""`diffusion2gan perceptual …`: fit, calibrate and import perceptual networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffusion2gan.cli.options import (
    DeviceOption,
    PrecisionOption,
    QuietOption,
    local_path,
    local_paths,
)
from diffusion2gan.errors import UserError

TransformsOption = Annotated[
    str,
    typer.Option(
        help="Random transforms of the network's inputs: blit, geometric, color, cutout, joined "
        "by +; none by default."
    ),
]
TransformShareOption = Annotated[
    float, typer.Option(help="Share of the samples that get a transform.")
]
ResamplingOption = Annotated[
    str, typer.Option(help="How transforms resample: bilinear, bicubic or oversampled.")
]

perceptual_app = typer.Typer(
    help="Train, calibrate or import perceptual networks.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def parse_widths(widths: str) -> tuple[int, ...]:
    """The numbers of `--widths`. Raises UserError if they are not positive numbers."""
    if not all(width.strip().isdigit() and int(width) > 0 for width in widths.split(",")):
        raise UserError(f"--widths {widths!r}: write five numbers, as in 64,128,256,512,512")
    return tuple(int(width) for width in widths.split(","))


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
        str | None,
        typer.Option(help="`pocket`, or the folder of a VAE or of a pipeline with one."),
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Fit a network on pixels: no VAE, three channels.")
    ] = False,
    widths: Annotated[
        str, typer.Option(help="Channels of the five stages.")
    ] = "64,128,256,512,512",
    size: Annotated[int, typer.Option(min=1, help="The images' side in pixels.")] = 256,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    transforms: TransformsOption = "",
    transform_share: TransformShareOption = 1.0,
    resampling: ResamplingOption = "bilinear",
    seed: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Train a feature network on the latents of labelled images.

    Run the same command again to resume. Under torchrun the ranks share the work.
    """
    # Check the options
    if pixels == (vae is not None):
        raise UserError("give --vae, the VAE of the latents, or --pixels: exactly one of the two")
    widths_given = parse_widths(widths)
    from diffusion2gan.perceptual.augment import parse_transforms
    from diffusion2gan.perceptual.fit import FitSettings, fit

    # Fit and report
    settings = FitSettings(
        widths=widths_given,
        size=size,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        transforms=parse_transforms(transforms, transform_share, resampling),
    )
    result = fit(images, out, vae, settings, device)
    if result is not None:
        typer.echo(
            f"{out}: top-1 {result['top1']:.2%} on {result['held_out']} held-out images, "
            f"{len(result['unreadable'])} unreadable. Next: diffusion2gan perceptual calibrate "
            f"--triplets FOLDER --network {out} --out NAME"
        )


@perceptual_app.command("calibrate")
def perceptual_calibrate(
    triplets: Annotated[
        Path,
        typer.Option(
            callback=local_path,
            help="Triplets in the layout of BAPPS: FOLDER/<subset>/ref, p0, p1, judge.",
        ),
    ],
    network: Annotated[str, typer.Option(help="`pocket` or a network's folder.")],
    out: Annotated[
        Path, typer.Option(callback=local_path, help="The calibrated network's folder.")
    ],
    vae: Annotated[
        str | None,
        typer.Option(help="The VAE of a network on latents; omit it for a network on pixels."),
    ] = None,
    scored: Annotated[
        Path | None,
        typer.Option(
            callback=local_path,
            help="Triplets to score; by default a held-out tenth of --triplets.",
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="The images' side in pixels.")] = 64,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-4,
    transforms: TransformsOption = "",
    transform_share: TransformShareOption = 1.0,
    resampling: ResamplingOption = "bilinear",
    seed: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Fit a network's heads to two-alternative forced choices.

    Run the same command again to resume.
    """
    from diffusion2gan.perceptual.augment import parse_transforms
    from diffusion2gan.perceptual.calibrate import CalibrationSettings, calibrate

    settings = CalibrationSettings(
        size=size,
        epochs=epochs,
        peak_lr=learning_rate,
        seed=seed,
        transforms=parse_transforms(transforms, transform_share, resampling),
    )
    result = calibrate(triplets, network, out, vae, scored, settings, device)
    for name, score in result.items():
        typer.echo(
            f"{name}: 2AFC {score['after']:.2%} (before: {score['before']:.2%}), "
            f"{score['count']} triplets"
        )


@perceptual_app.command("distil")
def perceptual_distil(
    pairs: Annotated[str, typer.Option(help="The pairs whose latents are used: a folder or URL.")],
    vae: Annotated[
        str, typer.Option(help="Their VAE: `pocket`, or the folder of a VAE or a pipeline.")
    ],
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            help="The network on images to reproduce: a folder that `perceptual import --format "
            "lpips` or `fit --pixels` wrote, or `pocket`.",
        ),
    ],
    out: Annotated[Path, typer.Option(callback=local_path, help="The network's folder.")],
    size: Annotated[
        Literal["full", "compact"],
        typer.Option(help="compact: widths of three eighths, for a cheaper loss."),
    ] = "full",
    widths: Annotated[
        str, typer.Option(help="Channels of the five stages of the full network.")
    ] = "64,128,256,512,512",
    students: Annotated[
        list[str] | None,
        typer.Option(
            help="An exported student of the same teacher, whose images are further "
            "perturbations; repeat it for several ages."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many latents of the set to use.")] = 12_500,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Latents per step, each with eight perturbations.")
    ] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-3,
    gradient_weight: Annotated[
        float,
        typer.Option(min=0.0, help="Weight of the gradients' direction; 0 is three times faster."),
    ] = 1.0,
    transforms: TransformsOption = "",
    transform_share: TransformShareOption = 1.0,
    resampling: ResamplingOption = "bilinear",
    decode_batch: Annotated[int, typer.Option(min=1, help="Images decoded at once.")] = 4,
    precision: PrecisionOption = "float32",
    seed: Annotated[int, typer.Option(min=0, max=255)] = 0,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the compute that is needed, train nothing.")
    ] = False,
) -> None:
    """Train a network on latents to reproduce a distance of decoded images, without labels.

    Run the same command again to resume. Under torchrun the ranks share the work.
    """
    widths_given = parse_widths(widths)
    from diffusion2gan.perceptual.augment import parse_transforms
    from diffusion2gan.perceptual.distil import DistilSettings, distil
    from diffusion2gan.runtime.storage import parse_location

    settings = DistilSettings(
        widths=widths_given,
        compact=size == "compact",
        count=count,
        epochs=epochs,
        batch_size=batch_size,
        peak_lr=learning_rate,
        gradient_weight=gradient_weight,
        transforms=parse_transforms(transforms, transform_share, resampling),
        precision=precision,
        decode_batch=decode_batch,
        seed=seed,
    )
    if dry_run:
        from diffusion2gan.cost.perceptual import plan_distil

        for key, value in plan_distil(parse_location(pairs), vae, from_, settings).items():
            typer.echo(f"{key}: {value}")
        return

    # Train and report
    result = distil(parse_location(pairs), vae, from_, out, settings, students, device)
    if result is not None:
        agreement, mse = result["held_out"], result["held_out_mse"]
        for key, value in agreement.items():
            if isinstance(value, float):
                typer.echo(f"{key}: {value:.4f} (mse of the latents: {mse[key]:.4f})")
        typer.echo(f"cost: {result['cost']['times_cheaper']:.1f} × cheaper than the full widths")
        typer.echo(f"{out}: next, set perceptual = {str(out)!r} in a recipe")


@perceptual_app.command("import")
def perceptual_import(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            callback=local_paths,
            help="The published checkpoint; several files if it is in parts.",
        ),
    ],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="lpips (standard LPIPS: torchvision's VGG-16, and the heads), elatentlpips or "
            "snu.",
        ),
    ],
    out: Annotated[Path, typer.Option(callback=local_path, help="The network's folder.")],
) -> None:
    """Convert published weights, with the settings that reproduce their formula."""
    from diffusion2gan.perceptual.importers import import_network

    for line in import_network(files, format_, out):
        typer.echo(line)
