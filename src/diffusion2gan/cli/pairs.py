"""`diffusion2gan pairs …`: its commands, each one call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from diffusion2gan.cli.options import (
    DeviceOption,
    ResolutionOption,
    TeacherConfigOption,
    TeacherLoraOption,
    TeacherOption,
    VaeOption,
    local_path,
)
from diffusion2gan.errors import UserError

pairs_app = typer.Typer(
    help="Make noise→image pairs, or look at a set of them.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@pairs_app.callback()
def pairs(
    context: typer.Context,
    out: Annotated[
        str | None, typer.Option(help="The folder of the set, or a URL as s3://bucket/set.")
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="A text file, one prompt a line, or `pocket`.")
    ] = "pocket",
    count: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 1024,
    num_inference_steps: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    guidance_scale: Annotated[float, typer.Option(min=0.0)] = 3.0,
    seed: Annotated[
        int, typer.Option(min=0, max=255, help="Sets of different seeds share no noise.")
    ] = 0,
    teacher: TeacherOption = "pocket",
    batch_size: Annotated[int, typer.Option(min=1, help="Changes the speed, not the pairs.")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs a file.")] = 128,
    keep_noise: Annotated[bool, typer.Option(help="Store the noise beside its seed.")] = False,
    shard_range: Annotated[
        str | None, typer.Option(help="A:B makes shards A to B−1 alone, for array jobs.")
    ] = None,
    device: DeviceOption = "cpu",
    teacher_config: TeacherConfigOption = None,
    teacher_lora: TeacherLoraOption = None,
    vae: VaeOption = None,
    resolution: ResolutionOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cost, make nothing.")
    ] = False,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0.0, help="With --dry-run: money, in whatever it is in.")
    ] = None,
) -> None:
    """Solve the teacher's ODE (deterministic DDIM) from per-pair noises; run again to continue."""
    if context.invoked_subcommand is not None:
        return
    if out is None:
        raise UserError("--out is missing: name the folder that shall hold the pairs")
    from diffusion2gan import assets
    from diffusion2gan.pairs import make, store
    from diffusion2gan.pocket import scenes
    from diffusion2gan.prompts import prompts_digest, read_prompts
    from diffusion2gan.runtime.distributed import get_ranks, rank_device
    from diffusion2gan.runtime.storage import parse_location
    from diffusion2gan.teacher.loading import load_teacher
    from diffusion2gan.teacher.pipeline import warn_truncated

    lines = [] if prompts == "pocket" else read_prompts(Path(prompts))
    place, shards = parse_location(out), parse_range(shard_range)
    loaded = load_teacher(
        teacher, rank_device(device), resolution, config=teacher_config, loras=teacher_lora, vae=vae
    )
    loaded.truncation_warned = bool(lines) and warn_truncated(
        loaded.tokenizer, lines, loaded.num_tokens
    )
    spec = store.PairsSpec(
        teacher=loaded.name,
        revision=loaded.revision,
        prompts=prompts if not lines else prompts_digest(lines),
        count=count,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        latent_shape=loaded.latent_shape,
        shard_size=shard_size,
        keep_noise=keep_noise,
    )

    def prompts_of(indices: Sequence[int]) -> list[str]:
        if lines:
            return [lines[i % len(lines)] for i in indices]
        return scenes.captions(indices, assets.pairs_world(seed))

    if dry_run:
        from diffusion2gan.cost.pairs import cost_of

        some = prompts_of(range(min(batch_size, count)))
        for key, value in cost_of(loaded, spec, some, price_per_gpu_hour).items():
            typer.echo(f"{key}: {value}")
        return
    make.make_pairs(loaded, prompts_of, spec, place, batch_size, shards)
    if get_ranks().is_main and shards is None:
        typer.echo(
            f"{out}: {count} pairs. Next: diffusion2gan distill pocket --pairs {out} --out runs/NAME"
        )
    elif get_ranks().is_main:
        typer.echo(
            f"{out}: shards {shard_range} are there. What is missing of the set: diffusion2gan pairs info {out}"
        )


def parse_range(text: str | None) -> range | None:
    """`3:7` → range(3, 7). Raises UserError at anything else."""
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit()):
        raise UserError(f"--shard-range {text!r}: write it as A:B, two numbers; A to B−1 are made")
    return range(int(start), int(stop))


SetArgument = Annotated[str, typer.Argument(help="The folder of a set, or its URL.")]


@pairs_app.command("info")
def pairs_info(folder: SetArgument) -> None:
    """What a set is made of, how much of it is there, the pace and the time left: from the disk alone."""
    from diffusion2gan.pairs import check, store
    from diffusion2gan.runtime.storage import parse_location

    place = parse_location(folder)
    for key, value in (vars(store.open_set(place)) | check.info(place, time.time())).items():
        typer.echo(f"{key}: {value}")


@pairs_app.command("verify")
def pairs_verify(
    folder: SetArgument,
    deep: Annotated[
        int, typer.Option(min=0, help="Also solve so many random pairs anew and compare.")
    ] = 0,
    teacher: TeacherOption = "pocket",
    seed: Annotated[int, typer.Option(min=0, help="Which pairs --deep takes.")] = 0,
    device: DeviceOption = "cpu",
    teacher_config: TeacherConfigOption = None,
    teacher_lora: TeacherLoraOption = None,
    vae: VaeOption = None,
    resolution: ResolutionOption = None,
) -> None:
    """Read every shard: checksums, order, seeds, finite numbers, no noise and no latents twice."""
    from diffusion2gan.errors import Failure
    from diffusion2gan.pairs import check, store
    from diffusion2gan.runtime.storage import parse_location

    place = parse_location(folder)
    problems = check.verify(place)
    if deep and not problems:
        from diffusion2gan.runtime.distributed import rank_device
        from diffusion2gan.teacher.loading import load_teacher

        loaded = load_teacher(
            teacher,
            rank_device(device),
            resolution,
            config=teacher_config,
            loras=teacher_lora,
            vae=vae,
        )
        problems = check.verify_deep(place, loaded, deep, seed)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise Failure(f"{folder}: {len(problems)} problems (above)")
    typer.echo(f"{folder}: all {store.open_set(place).count} pairs are well")


@pairs_app.command("merge")
def pairs_merge(
    folders: Annotated[list[str], typer.Argument(help="Folders that hold shards of one set.")],
    out: Annotated[str, typer.Option(help="The folder of the whole set.")],
) -> None:
    """Put shards of one set, made in several places, into one folder."""
    from diffusion2gan.pairs import exchange
    from diffusion2gan.runtime.storage import parse_location

    there, wanted = exchange.merge(
        [parse_location(folder) for folder in folders], parse_location(out)
    )
    typer.echo(f"{out}: {there} of {wanted} shards")


@pairs_app.command("export")
def pairs_export(
    folder: SetArgument,
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder to write.")],
    format_: Annotated[str, typer.Option("--format", help="webdataset")] = "webdataset",
) -> None:
    """Write a set in another format: tar shards for WebDataset; run again to continue."""
    from diffusion2gan.pairs import exchange
    from diffusion2gan.runtime.storage import parse_location

    if format_ != "webdataset":
        raise UserError(f"--format {format_!r}: only webdataset is known")
    typer.echo(f"{out}: {exchange.export_webdataset(parse_location(folder), out)} tar files")


@pairs_app.command("import")
def pairs_import(
    folder: Annotated[Path, typer.Argument(callback=local_path, help="What `pairs export` wrote.")],
    out: Annotated[str, typer.Option(help="The folder of the set.")],
) -> None:
    """Read exported tar shards back into a set; run again to continue."""
    from diffusion2gan.pairs import exchange
    from diffusion2gan.runtime.storage import parse_location

    typer.echo(f"{out}: {exchange.import_webdataset(folder, parse_location(out))} shards")
