"""`diffusion2gan export` and `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import DeviceOption, PrecisionOption, local_path


def export(
    run: Annotated[
        Path, typer.Argument(callback=local_path, help="A run's folder, or one of its checkpoints.")
    ],
    out: Annotated[Path, typer.Option(callback=local_path, help="The pipeline folder to write.")],
    half: Annotated[bool, typer.Option("--half", help="Write float16 weights.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export of another run in --out.")
    ] = False,
    metrics: Annotated[
        Path | None,
        typer.Option(
            callback=local_path,
            help="What evaluate wrote, for the model card. Default: metrics.json in the run.",
        ),
    ] = None,
) -> None:
    """Write the student as a pipeline folder for stock diffusers.

    It runs with num_inference_steps=1 and guidance_scale=0.
    """
    import torch

    from diffusion2gan.export import export as export_run

    dtype = torch.float16 if half else torch.float32
    export_run(run, out, dtype, overwrite=overwrite, metrics=metrics)
    call = "(prompt, num_inference_steps=1, guidance_scale=0)"
    typer.echo(f"{out}: DiffusionPipeline.from_pretrained({str(out)!r}){call}")


def generate(
    student: Annotated[
        str, typer.Argument(help="pocket-student, pocket-teacher or a pipeline folder.")
    ],
    prompt: Annotated[list[str], typer.Option(help="A prompt; repeat it for more rows.")],
    out: Annotated[Path, typer.Option(callback=local_path, help="The image file to write.")],
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the first image of each row.")
    ] = 0,
    per_prompt: Annotated[
        int, typer.Option(min=1, help="Images per prompt, from seeds seed, seed+1, …")
    ] = 4,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps, if not the system's default.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance, if not the system's default.")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "float32",
) -> None:
    """Generate images and print the seconds per image."""
    from diffusion2gan import generate as job
    from diffusion2gan.pipelines.system import load_system
    from diffusion2gan.runtime.distributed import get_ranks, rank_device

    system = load_system(
        student, num_inference_steps, guidance_scale, rank_device(device), precision
    )
    seconds = job.generate(system, prompt, seed, per_prompt, out)
    if get_ranks().is_main:
        num_images = len(prompt) * per_prompt
        typer.echo(f"{out}: {num_images} images, {system.note}, {seconds:.4f} seconds per image")
