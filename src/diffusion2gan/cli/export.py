"""`diffusion2gan export` and `generate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import DeviceOption, PrecisionOption, QuietOption, local_path
from diffusion2gan.errors import UserError


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
    variant: Annotated[
        str | None,
        typer.Option(help='fp16: float16 weights in files named so, for variant="fp16".'),
    ] = None,
    single_file: Annotated[
        bool,
        typer.Option(
            "--single-file",
            help="Also write OUT/NAME.safetensors, for ComfyUI, A1111 and from_single_file; of a "
            "flow model the transformer.",
        ),
    ] = False,
    sample_prompts: Annotated[
        Path | None,
        typer.Option(
            callback=local_path,
            help="A text file: the first 4 lines are the prompts of the model card's samples.",
        ),
    ] = None,
    no_samples: Annotated[
        bool, typer.Option("--no-samples", help="Generate no images for the model card.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Upload the folder to ORG/NAME of the Hugging Face hub afterwards."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: create a private repository.")
    ] = False,
) -> None:
    """Write the student as a pipeline folder for stock diffusers.

    It runs with num_inference_steps=1 and guidance_scale=0. Nothing is uploaded without
    --push-to-hub.
    """
    # Options that do not fit together
    if variant not in (None, "fp16"):
        raise UserError(f"--variant {variant!r} is unknown; only fp16 is supported")
    if no_samples and sample_prompts is not None:
        raise UserError("--no-samples and --sample-prompts exclude each other; leave one out")
    if private and push_to_hub is None:
        raise UserError("--private belongs to --push-to-hub ORG/NAME; leave it out, or name both")
    if push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push_to_hub):
        raise UserError(f"--push-to-hub {push_to_hub!r}: write it as ORG/NAME")

    import torch

    from diffusion2gan.export import export as export_run
    from diffusion2gan.export import push_to_hub as upload
    from diffusion2gan.prompts import read_prompts

    prompts: list[str] | None = [] if no_samples else None
    if sample_prompts is not None:
        prompts = read_prompts(sample_prompts)
    snippet = export_run(
        run,
        out,
        torch.float16 if half or variant else torch.float32,
        overwrite=overwrite,
        metrics=metrics,
        variant=variant,
        single_file=single_file,
        sample_prompts=prompts,
    )
    typer.echo(f"{out}: to use it,\n\n{snippet}")
    if push_to_hub is not None:
        typer.echo(f"\npushed to {upload(out, push_to_hub, private)}")


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
    quiet: QuietOption = False,
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
