"""`diffusion2gan evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffusion2gan.cli.options import local_path
from diffusion2gan.errors import UserError


def evaluate(
    system: Annotated[
        str,
        typer.Argument(
            help="pocket-teacher, pocket-student, a folder (pipeline or pictures), or ROW=FOLDER[+FILE]."
        ),
    ],
    out: Annotated[Path, typer.Option(callback=local_path, help="The JSON file to write.")] = Path(
        "metrics.json"
    ),
    count: Annotated[int, typer.Option(min=2, help="Held-out captions.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=127)] = 0,
    num_inference_steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0.0)] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            callback=local_path, help="Where pictures are kept; beside --out if not given."
        ),
    ] = None,
    num_noises: Annotated[
        int, typer.Option(min=1, help="Pictures a caption; above 1 tells diversity too.")
    ] = 1,
    num_resamples: Annotated[
        int, typer.Option(min=0, help="Of the 95 % intervals; 0 leaves them out.")
    ] = 1000,
    protocol: Annotated[str, typer.Option(help="pocket, coco2014-30k or coco2017-5k.")] = "pocket",
    captions: Annotated[
        Path | None,
        typer.Option(
            callback=local_path, help="COCO: one caption a line, or the annotations .json."
        ),
    ] = None,
    captions_sha256: Annotated[
        str | None, typer.Option(help="COCO: refuse another list of captions.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(callback=local_path, help="COCO: the folder of real pictures.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(callback=local_path, help="COCO: the FID network's weights.")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="COCO: a CLIP, folder or id.")] = None,
    dinov2: Annotated[str | None, typer.Option(help="COCO: a DINOv2, folder or id.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="COCO: whose pictures of the same noises to hold against.")
    ] = None,
    device: Annotated[str, typer.Option(help="COCO: cpu, cuda, …")] = "cpu",
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="COCO: the system's.")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="COCO: pictures made at once.")] = 1,
) -> None:
    """Measure a system: on the pocket world's held-out captions, or by a COCO protocol with your own files."""
    from diffusion2gan.evaluate import run as job
    from diffusion2gan.evaluate.protocols import get_protocol

    if out.is_dir():
        raise UserError(
            f"--out {out} is a folder; name the JSON file to write, such as {out / 'metrics.json'}"
        )
    kept = cache or out.parent / "pictures"
    if get_protocol(protocol).count is None:
        metrics = job.evaluate(
            system,
            count=count,
            seed=seed,
            cache=kept,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_noises=num_noises,
            num_resamples=num_resamples,
        )
    elif captions is None or reference is None:
        raise UserError(f"--protocol {protocol} needs --captions FILE and --reference FOLDER")
    else:
        metrics = job.evaluate_published(
            system,
            protocol,
            captions=captions,
            captions_sha256=captions_sha256,
            reference=reference,
            cache=kept,
            inception=inception,
            clip=clip,
            dinov2=dinov2,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            device=device,
            precision=precision,
            batch_size=batch_size,
            num_resamples=num_resamples,
            teacher=teacher,
            num_noises=num_noises,
        )
    if not metrics:  # under torchrun: another rank than the first, which measures
        return
    job.save_metrics(out, metrics)
    for key, value in metrics.items():
        typer.echo(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
