"""`diffusion2gan pairs …`: making sets of pairs, and commands on existing sets."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffusion2gan.cli.options import (
    DeviceOption,
    PriceOption,
    ResolutionOption,
    TeacherConfigOption,
    TeacherLoraOption,
    TeacherOption,
    VaeOption,
    local_path,
)
from diffusion2gan.errors import Failure, UserError

if TYPE_CHECKING:
    from diffusion2gan.pairs.make import Prompts

pairs_app = typer.Typer(
    help="Make noise→image pairs, or check, merge or convert them.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@pairs_app.callback()
def pairs(
    context: typer.Context,
    out: Annotated[
        str | None, typer.Option(help="The folder of the set, or a URL such as s3://bucket/set.")
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="A text file with one prompt per line, or `pocket`.")
    ] = "pocket",
    count: Annotated[int, typer.Option(min=1, help="The number of pairs.")] = 1024,
    solver: Annotated[
        str,
        typer.Option(
            help="dpm++: DPM-Solver++(2M), a quarter of the squared error of 50 ddim steps in 20 "
            "(on the pocket teacher); ddim: DDIM, or Euler for flow models."
        ),
    ] = "dpm++",
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Steps of the solver. Default: ddim 50; dpm++ 20 (30 for flow "
            "models, 40 with zero terminal SNR).",
        ),
    ] = None,
    guidance_scale: Annotated[
        float, typer.Option(min=0.0, help="Classifier-free guidance of the teacher.")
    ] = 3.0,
    seed: Annotated[
        int, typer.Option(min=0, max=255, help="Sets of different seeds share no noise.")
    ] = 0,
    negative_prompt: Annotated[
        str, typer.Option(help="Guides away from this prompt, not from no prompt.")
    ] = "",
    teacher: TeacherOption = "pocket",
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(
            help="The precision of the denoising network; x0 and the solver stay in float32. "
            "bfloat16 runs on a CPU too, slowly; float16 needs a GPU."
        ),
    ] = "float32",
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep the VAE on the CPU, and the text encoders except while they encode a shard.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Affects the speed, not the pairs.")] = 64,
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs per file.")] = 128,
    keep_noise: Annotated[bool, typer.Option(help="Store the noise beside its seed.")] = False,
    shard_range: Annotated[
        str | None, typer.Option(help="A:B makes only shards A to B−1, for array jobs.")
    ] = None,
    device: DeviceOption = "cpu",
    teacher_config: TeacherConfigOption = None,
    teacher_lora: TeacherLoraOption = None,
    vae: VaeOption = None,
    resolution: ResolutionOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the estimated cost, make nothing.")
    ] = False,
    price_per_gpu_hour: PriceOption = None,
) -> None:
    """Solve the teacher's ODE from per-pair noise, without randomness; run again to continue."""
    if context.invoked_subcommand is not None:
        return
    if out is None:
        raise UserError("--out is missing: name the folder for the pairs")
    from diffusion2gan.pairs import make
    from diffusion2gan.runtime.distributed import get_ranks, resolve_device
    from diffusion2gan.runtime.storage import parse_location
    from diffusion2gan.teacher.loading import load_teacher
    from diffusion2gan.teacher.ode import check_solver
    from diffusion2gan.teacher.pipeline import check_precision

    # Read the prompts and check the arguments before the teacher is loaded
    check_solver(solver)
    torch_device = resolve_device(device, "give --device cpu")
    check_precision(precision, torch_device)
    source = read_source(prompts, seed)
    location = parse_location(out)
    shards = parse_range(shard_range)

    # Describe the set
    loaded = load_teacher(
        teacher, torch_device, resolution, config=teacher_config, loras=teacher_lora, vae=vae
    )
    loaded.set_precision(precision)
    settings = make.PairsSettings(
        count=count,
        seed=seed,
        solver=solver,
        negative_prompt=negative_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        shard_size=shard_size,
        keep_noise=keep_noise,
    )
    spec = make.build_spec(loaded, source, settings, prompts_name=prompts)

    # Estimate the cost
    if dry_run:
        from diffusion2gan.cost.pairs import estimate_pairs_cost

        batch = make.prepare_prompts(loaded, source)(range(min(batch_size, count)))
        for key, value in estimate_pairs_cost(loaded, spec, batch, price_per_gpu_hour).items():
            typer.echo(f"{key}: {value}")
        return

    # Make the pairs
    make.make_pairs(loaded, source, spec, location, batch_size, shards, offload)
    if not get_ranks().is_main:
        return
    if shards is None:
        typer.echo(
            f"{out}: {count} pairs. Next: diffusion2gan distill pocket --pairs {out} "
            "--out runs/NAME"
        )
    else:
        typer.echo(
            f"{out}: shards {shard_range} are finished. To see which shards of the set are "
            f"missing: diffusion2gan pairs info {out}"
        )


def read_source(prompts: str, seed: int) -> Prompts:
    """The captions of the pocket world for a set with this seed, or the lines of a text file."""
    from diffusion2gan.pocket import scenes
    from diffusion2gan.prompts import read_prompts

    if prompts == "pocket":
        return scenes.pairs_captions(seed)
    return read_prompts(Path(prompts))


def parse_range(text: str | None) -> range | None:
    """`3:7` → range(3, 7); None is None. Raises UserError for any other text."""
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit()):
        raise UserError(
            f"--shard-range {text!r}: write it as A:B, two numbers, to make shards A to B−1"
        )
    return range(int(start), int(stop))


SetArgument = Annotated[str, typer.Argument(help="The folder of a set, or its URL.")]


@pairs_app.command("info")
def pairs_info(folder: SetArgument) -> None:
    """Print a set's settings, progress, speed and time left."""
    from diffusion2gan.pairs import check, store
    from diffusion2gan.runtime.storage import parse_location

    location = parse_location(folder)
    for key, value in vars(store.open_set(location)).items():
        typer.echo(f"{key}: {value}")
    for key, value in check.info(location, time.time()).items():
        typer.echo(f"{key}: {value}")


@pairs_app.command("verify")
def pairs_verify(
    folder: SetArgument,
    deep: Annotated[
        int, typer.Option(min=0, help="Also solve this many random pairs again and compare.")
    ] = 0,
    teacher: TeacherOption = "pocket",
    seed: Annotated[int, typer.Option(min=0, help="Chooses the pairs of --deep.")] = 0,
    device: DeviceOption = "cpu",
    teacher_config: TeacherConfigOption = None,
    teacher_lora: TeacherLoraOption = None,
    vae: VaeOption = None,
    resolution: ResolutionOption = None,
) -> None:
    """Read and check every shard.

    Checked are checksums, order, seeds, finite numbers, and that no noise or latents occur twice.
    """
    from diffusion2gan.pairs import check, store
    from diffusion2gan.runtime.distributed import resolve_device
    from diffusion2gan.runtime.storage import parse_location

    # Check the device before the shards are read, which may take long
    location = parse_location(folder)
    if deep:
        from diffusion2gan.teacher.pipeline import check_precision

        torch_device = resolve_device(device, "give --device cpu")
        check_precision(store.open_set(location).precision, torch_device)

    # Read every shard
    problems = check.verify(location)

    # Solve some pairs again
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
        loaded.set_precision(store.open_set(location).precision)
        problems = check.verify_deep(location, loaded, deep, seed)

    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise Failure(f"{folder}: {len(problems)} problems (above)")
    typer.echo(f"{folder}: all {store.open_set(location).count} pairs are valid")


@pairs_app.command("merge")
def pairs_merge(
    folders: Annotated[list[str], typer.Argument(help="Folders with shards of one set.")],
    out: Annotated[str, typer.Option(help="The folder of the merged set.")],
) -> None:
    """Copy shards of one set, made in several folders, into one folder."""
    from diffusion2gan.pairs import exchange
    from diffusion2gan.runtime.storage import parse_location

    locations = [parse_location(folder) for folder in folders]
    num_present, num_shards = exchange.merge(locations, parse_location(out))
    typer.echo(f"{out}: {num_present} of {num_shards} shards")


@pairs_app.command("export")
def pairs_export(
    folder: SetArgument,
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder to write.")],
    format_: Annotated[
        str, typer.Option("--format", help="The format to write: webdataset.")
    ] = "webdataset",
) -> None:
    """Write a set as tar shards for WebDataset.

    Run it again to continue.
    """
    from diffusion2gan.pairs import exchange
    from diffusion2gan.runtime.storage import parse_location

    if format_ != "webdataset":
        raise UserError(f"--format {format_!r} is unknown; only webdataset is supported")
    typer.echo(f"{out}: {exchange.export_webdataset(parse_location(folder), out)} tar files")


@pairs_app.command("import")
def pairs_import(
    folder: Annotated[
        Path, typer.Argument(callback=local_path, help="A folder that `pairs export` wrote.")
    ],
    out: Annotated[str, typer.Option(help="The folder of the set.")],
) -> None:
    """Read exported tar shards back into a set; run again to continue."""
    from diffusion2gan.pairs import exchange
    from diffusion2gan.runtime.storage import parse_location

    typer.echo(f"{out}: {exchange.import_webdataset(folder, parse_location(out))} shards")
