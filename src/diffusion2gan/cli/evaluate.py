"""`diffusion2gan evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import DeviceOption, PrecisionOption, QuietOption, local_path
from diffusion2gan.errors import UserError


def evaluate(
    system: Annotated[
        str,
        typer.Argument(
            help="pocket-teacher, pocket-student, a folder (a pipeline, or images named by caption "
            "index), or ROW=FOLDER[+FILE] of a published system."
        ),
    ],
    out: Annotated[Path, typer.Option(callback=local_path, help="The JSON file to write.")] = Path(
        "metrics.json"
    ),
    count: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of prompts: the first of --prompts (default: all), or held-out captions "
            "of the pocket world (default 1000).",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=127, help="Seed of the noise and of the pocket captions.")
    ] = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps, if not the system's default.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance, if not the system's default.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            callback=local_path,
            help="The folder in which images and features are kept; by default beside --out.",
        ),
    ] = None,
    num_noises: Annotated[
        int, typer.Option(min=1, help="Images per caption; above 1, diversity is measured too.")
    ] = 1,
    num_resamples: Annotated[
        int, typer.Option(min=0, help="Resamples for the 95 % intervals; 0: no intervals.")
    ] = 1000,
    prompts: Annotated[
        Path | None,
        typer.Option(
            callback=local_path,
            help="Your own prompts, in any format that `pairs` reads, or `starter`.",
        ),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="The column of --prompts, if it is a table.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="pocket, own, coco2014-30k or coco2017-5k; own with --prompts, otherwise pocket."
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            callback=local_path,
            help="COCO: a text file with one caption per line, or the annotations .json.",
        ),
    ] = None,
    captions_sha256: Annotated[
        str | None, typer.Option(help="COCO: the expected sha256 of the captions; checked.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(callback=local_path, help="A folder of real images; COCO needs it."),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            callback=local_path, help="The weights file of the FID network (needs the extra eval)."
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="A CLIP, as a folder or the id of a downloaded model.")
    ] = None,
    dinov2: Annotated[
        str | None,
        typer.Option(help="A DINOv2, as a folder or the id of a downloaded model."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="The system to compare with, image by image, at the same noise."),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "float32",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images generated at once (default 1; pocket: 64).")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a system's images: on your own prompts, on the pocket world, or on COCO.

    With --prompts: CLIP score, distances to the images of --teacher from the same noises and to
    real ones (--reference), speed. Distances are in the features of the first given of
    --inception, --dinov2 and --clip, or of a small shipped network.
    """
    from diffusion2gan.evaluate.run import evaluate as run_evaluation
    from diffusion2gan.evaluate.settings import EvaluateSettings
    from diffusion2gan.runtime.files import write_json

    if out.is_dir():
        raise UserError(
            f"--out {out} is a folder; name the JSON file to write, such as {out / 'metrics.json'}"
        )

    settings = EvaluateSettings(
        system=system,
        cache=cache or out.parent / "pictures",
        protocol=protocol,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_noises=num_noises,
        num_resamples=num_resamples,
        count=count,
        prompts=prompts,
        prompt_column=prompt_column,
        captions=captions,
        captions_sha256=captions_sha256,
        reference=reference,
        inception=inception,
        clip=clip,
        dinov2=dinov2,
        teacher=teacher,
        device=device,
        precision=precision,
        batch_size=batch_size,
    )
    metrics = run_evaluation(settings)

    # Under torchrun only rank 0 measures
    if not metrics:
        return
    write_json(out, metrics)
    for key, value in metrics.items():
        typer.echo(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
