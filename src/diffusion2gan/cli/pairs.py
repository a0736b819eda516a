"""`diffusion2gan pairs …`: making sets of pairs, and commands on existing sets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffusion2gan.cli.options import (
    DeviceOption,
    PriceOption,
    QuietOption,
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
        str | None,
        typer.Option(
            help="A text file with one prompt per line, JSONL, CSV, Parquet, COCO annotations, a "
            "saved Hugging Face dataset, or `starter`: plain prompts for first tries. The pocket "
            "teacher's default is `pocket`, the captions of its world."
        ),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="The column of --prompts, if it is a table.")
    ] = None,
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
    device: DeviceOption = "auto",
    teacher_config: TeacherConfigOption = None,
    teacher_lora: TeacherLoraOption = None,
    vae: VaeOption = None,
    resolution: ResolutionOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the estimated cost, make nothing.")
    ] = False,
    price_per_gpu_hour: PriceOption = None,
    quiet: QuietOption = False,
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
    prompts_name, source = read_source(prompts, prompt_column, teacher, seed)
    location = parse_location(out)
    shards = parse_range(shard_range)

    # Describe the set
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

    # Without the weights, or the memory for them, the cost is only counted
    if dry_run:
        from diffusion2gan.cost.limits import load_counted_teacher, reason_too_large
        from diffusion2gan.cost.pairs import count_pairs_cost, estimate_pairs_cost, weight_bytes

        counted, reason = load_counted_teacher(teacher, teacher_config, resolution)
        if counted is not None:
            spec = make.build_spec(counted, source, settings, prompts_name=prompts_name)
            reason = reason or reason_too_large(weight_bytes(counted), torch_device)
        if counted is not None and reason is not None:
            print_cost(count_pairs_cost(counted, spec))
            typer.echo(f"not_measured: time, because {reason}")
            return

    # Load the teacher
    loaded = load_teacher(
        teacher, torch_device, resolution, config=teacher_config, loras=teacher_lora, vae=vae
    )
    loaded.set_precision(precision)
    spec = make.build_spec(loaded, source, settings, prompts_name=prompts_name)
    if dry_run:
        batch = make.prepare_prompts(loaded, source)(range(min(batch_size, count)))
        print_cost(estimate_pairs_cost(loaded, spec, batch, price_per_gpu_hour))
        return

    # Make the pairs
    make.make_pairs(loaded, source, spec, location, batch_size, shards, offload)
    if not get_ranks().is_main:
        return
    if shards is None:
        arguments = {
            "teacher": teacher,
            "teacher_config": teacher_config,
            "teacher_lora": teacher_lora,
            "vae": vae,
            "resolution": resolution,
        }
        pipeline_class = type(loaded.pipeline).__name__
        typer.echo(f"{out}: {count} pairs. Next: {next_command(pipeline_class, arguments, out)}")
    else:
        typer.echo(
            f"{out}: shards {shard_range} are finished. To see which shards of the set are "
            f"missing: diffusion2gan pairs info {out}"
        )


def print_cost(cost: Mapping[str, float | int | str]) -> None:
    for key, value in cost.items():
        typer.echo(f"{key}: {value}")


def read_source(
    prompts: str | None, column: str | None, teacher: str, seed: int
) -> tuple[str, Prompts]:
    """(the prompts' name, the captions of the pocket world for this seed or the prompts of a file).

    Prints where the prompts of a file are from. Raises UserError if none are named for a teacher
    other than the pocket teacher.
    """
    from diffusion2gan.pocket import scenes
    from diffusion2gan.prompts import STARTER, load_prompts
    from diffusion2gan.runtime.distributed import get_ranks
    from diffusion2gan.runtime.progress import console

    if prompts is None and teacher != "pocket":
        raise UserError(
            f"--prompts is missing: teacher {teacher} needs prompts like those that its student "
            "will be used with. Give --prompts FILE (one prompt per line; or JSONL, CSV, Parquet, "
            "COCO annotations, a saved dataset), or --prompts "
            f"{STARTER} for a first try: plain prompts that are in the package."
        )
    if prompts is None or prompts == "pocket":
        if column is not None:
            raise UserError(f"--prompt-column {column}: the pocket world's captions have no column")
        return "pocket", scenes.pairs_captions(seed)

    loaded = load_prompts(Path(prompts), column)
    if get_ranks().is_main:
        console.print(loaded.report, soft_wrap=True)
    return prompts, loaded.prompts


# The recipes to start from, by the teacher's pipeline class; a LoRA's first.
RECIPES = {
    "StableDiffusionPipeline": ("sd15-lora-24gb", "sd15"),
    "StableDiffusionXLPipeline": ("sdxl-lora-24gb", "sdxl"),
    "StableDiffusion3Pipeline": ("sd3",),
    "FluxPipeline": ("flux-lora",),
    "SanaPipeline": ("sd3",),
}


def next_command(pipeline_class: str, arguments: dict[str, str | int | None], out: str) -> str:
    """The `distill` command for pairs that a teacher made.

    `arguments`: the settings of that teacher, by their names in a recipe. The recipe trains a LoRA
    if its extra is installed and the family has such a recipe.
    """
    import importlib.util
    import shlex

    # Recipe
    teacher = arguments["teacher"]
    has_peft = importlib.util.find_spec("peft") is not None
    recipes = ("pocket",) if teacher == "pocket" else RECIPES[pipeline_class]
    recipe = recipes[0] if has_peft else recipes[-1]
    note = ""
    if "lora" in recipe and not has_peft:
        note = " (needs peft: pip install 'diffusion2gan[lora]')"

    # Command
    words = ["diffusion2gan", "distill", recipe]
    for name, value in arguments.items():
        if value is not None and (name, value) != ("teacher", "pocket"):
            words += ["--set", f"{name}={value}"]
    words += ["--pairs", out, "--out", "runs/NAME"]
    return shlex.join(words) + note


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
    device: DeviceOption = "auto",
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
