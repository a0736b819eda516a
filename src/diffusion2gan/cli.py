"""One command per job: parse, build the recipe, call one function. Heavy imports wait until a job starts."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffusion2gan.cli_pairs import DeviceOption, here, pairs_app
from diffusion2gan.errors import Diffusion2GANError, UserError

app = typer.Typer(
    help="Distil a diffusers text-to-image pipeline into a one-step generator: pairs → distill → export → evaluate → "
    "compare. Every long job continues when the same command is run again.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
pocket_app = typer.Typer(help="The embedded world.", no_args_is_help=True, rich_markup_mode=None)
perceptual_app = typer.Typer(help="Networks for the perceptual losses.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(pairs_app, name="pairs")
app.add_typer(perceptual_app, name="perceptual")
app.add_typer(pocket_app, name="pocket")

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
CONTINUE = "run the same command to continue"

PrecisionOption = Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="The systems'.")]
PriceOption = Annotated[float | None, typer.Option(min=0.0, help="With --dry-run: money, in whatever it is in.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A recipe's setting, key=value; repeatable.")]


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="A .toml file or a shipped recipe: pocket, pocket-demo, sd15, …")],
    pairs: Annotated[str, typer.Option(help="The pairs to learn from: a folder or a URL.")],
    out: Annotated[Path, typer.Option(callback=here, help="The run's folder.")],
    set_: SetOption = None,
    allow_change: Annotated[
        list[str] | None, typer.Option(help="A harmless setting that may differ from the run's, as accumulate.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and the cost, train nothing.")] = False,
    price_per_gpu_hour: PriceOption = None,
) -> None:
    """Train a one-step student; run again to resume exactly."""
    from diffusion2gan.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    from diffusion2gan.distill import train
    from diffusion2gan.runtime.places import place_of
    from diffusion2gan.runtime.ranks import ranks

    for key, value in loaded.model_dump().items() if ranks().first else ():
        typer.echo(f"{key} = {value!r}")

    if dry_run:
        for key, value in train.dry_run(loaded, place_of(pairs), price_per_gpu_hour).items():
            typer.echo(f"{key}: {value}")
        return
    train.distill(loaded, place_of(pairs), out, allow_change or [])
    if ranks().first:
        typer.echo(f"{out}: {loaded.pairs_seen} pairs seen. Next: diffusion2gan export {out} --out export/NAME")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A .toml file or a shipped recipe.")],
    gpus: Annotated[int, typer.Option(min=1)] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200.")] = "h100",
    model: Annotated[str | None, typer.Option(help="sd15 or sdxl, if not what the recipe's teacher names.")] = None,
    num_pairs: Annotated[float, typer.Option(min=1.0, help="As 3e6.")] = 3e6,
    dollars_per_hour: Annotated[float | None, typer.Option(min=0.0, help="Of one GPU.")] = None,
    set_: SetOption = None,
) -> None:
    """Estimate pairs and training on many GPUs, by arithmetic on stated inputs (docs/scale.md)."""
    from diffusion2gan import plan as job
    from diffusion2gan.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    name, why = (model, "--model") if model else job.model_of(loaded)
    is_set = any(setting.partition("=")[0].strip() == "accumulate" for setting in set_ or [])
    stages = job.plan(name, gpu, gpus, num_pairs, loaded, dollars_per_hour, loaded.accumulate if is_set else None)
    parts, fits = stages["distill"]["accumulate"], stages["distill"]["fits"]
    chosen = "the fewest parts that fit" if fits else "nothing fits, so one pair a part"
    typer.echo(f"model: {name} ({why})")
    typer.echo(f"accumulate: {parts} ({'--set' if is_set else f'{chosen}; the recipe has {loaded.accumulate}'})")
    for stage, numbers in stages.items():
        for key, value in numbers.items():
            typer.echo(f"{stage}.{key}: {value:.4g}" if isinstance(value, float) else f"{stage}.{key}: {value}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(callback=here, help="A run's folder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(callback=here, help="The pipeline folder to write.")],
    half: Annotated[bool, typer.Option("--half", help="float16 weights.")] = False,
) -> None:
    """Write a pipeline folder that stock diffusers runs with num_inference_steps=1, guidance_scale=0."""
    import torch

    from diffusion2gan import export as job

    job.export(run, out, torch.float16 if half else torch.float32)
    typer.echo(
        f"{out}: DiffusionPipeline.from_pretrained({str(out)!r})(prompt, num_inference_steps=1, guidance_scale=0)"
    )


@app.command()
def generate(
    student: Annotated[str, typer.Argument(help="pocket-student, pocket-teacher or a pipeline folder.")],
    prompt: Annotated[list[str], typer.Option(help="Repeat it for several prompts, one row each.")],
    out: Annotated[Path, typer.Option(callback=here, help="The picture to write.")],
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    per_prompt: Annotated[int, typer.Option(min=1, help="Pictures a prompt, from seeds seed, seed+1, …")] = 4,
    num_inference_steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0.0)] = None,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "float32",
) -> None:
    """Make pictures and print the seconds each took."""
    from diffusion2gan import generate as job
    from diffusion2gan.evaluate.systems import load_system
    from diffusion2gan.runtime.ranks import own_device, ranks

    system = load_system(student, num_inference_steps, guidance_scale, own_device(device), precision)
    seconds = job.generate(system, prompt, seed, per_prompt, out)
    if ranks().first:
        typer.echo(f"{out}: {len(prompt) * per_prompt} pictures, {system.note}, {seconds:.4f} seconds per picture")


@app.command()
def evaluate(
    system: Annotated[
        str,
        typer.Argument(help="pocket-teacher, pocket-student, a folder (pipeline or pictures), or ROW=FOLDER[+FILE]."),
    ],
    out: Annotated[Path, typer.Option(callback=here, help="The JSON file to write.")] = Path("metrics.json"),
    count: Annotated[int, typer.Option(min=2, help="Held-out captions.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=127)] = 0,
    num_inference_steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0.0)] = None,
    cache: Annotated[
        Path | None, typer.Option(callback=here, help="Where pictures are kept; beside --out if not given.")
    ] = None,
    num_noises: Annotated[int, typer.Option(min=1, help="Pictures a caption; above 1 tells diversity too.")] = 1,
    num_resamples: Annotated[int, typer.Option(min=0, help="Of the 95 % intervals; 0 leaves them out.")] = 1000,
    protocol: Annotated[str, typer.Option(help="pocket, coco2014-30k or coco2017-5k.")] = "pocket",
    captions: Annotated[
        Path | None, typer.Option(callback=here, help="COCO: one caption a line, or the annotations .json.")
    ] = None,
    captions_sha256: Annotated[str | None, typer.Option(help="COCO: refuse another list of captions.")] = None,
    reference: Annotated[Path | None, typer.Option(callback=here, help="COCO: the folder of real pictures.")] = None,
    inception: Annotated[Path | None, typer.Option(callback=here, help="COCO: the FID network's weights.")] = None,
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
    from diffusion2gan.evaluate import evaluate as job
    from diffusion2gan.evaluate.protocols import protocol_of

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the JSON file to write, such as {out / 'metrics.json'}")
    kept = cache or out.parent / "pictures"
    if protocol_of(protocol).count is None:
        metrics = job.evaluate(
            system, count=count, seed=seed, cache=kept, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, num_noises=num_noises, num_resamples=num_resamples,
        )  # fmt: skip
    elif captions is None or reference is None:
        raise UserError(f"--protocol {protocol} needs --captions FILE and --reference FOLDER")
    else:
        metrics = job.evaluate_published(
            system, protocol, captions=captions, captions_sha256=captions_sha256, reference=reference, cache=kept,
            inception=inception, clip=clip, dinov2=dinov2, seed=seed, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, device=device, precision=precision, batch_size=batch_size,
            num_resamples=num_resamples, teacher=teacher, num_noises=num_noises,
        )  # fmt: skip
    if not metrics:  # under torchrun: another rank than the first, which measures
        return
    job.save_metrics(out, metrics)
    for key, value in metrics.items():
        typer.echo(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


@app.command()
def compare(
    system: Annotated[
        list[str],
        typer.Option(help="NAME=PATH, NAME=PATH@STEPS, NAME=ROW=FOLDER (as evaluate's) or NAME=PICTURES; repeatable."),
    ],
    prompts: Annotated[Path, typer.Option(callback=here, help="A text file, one prompt a line, one row each.")],
    out: Annotated[Path, typer.Option(callback=here, help="The report's folder.")],
    metrics: Annotated[list[str] | None, typer.Option(help="NAME=metrics.json, from evaluate; repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=255)] = 255,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "float32",
) -> None:
    """Write a page with several systems' pictures of the same prompts from the same noises; run again to continue."""
    from diffusion2gan.compare import compare as job
    from diffusion2gan.compare.pictures import parse_names, parse_systems
    from diffusion2gan.pairs.make import read_prompts

    lines = read_prompts(prompts)
    named = parse_names(metrics or [], "--metrics")
    measured = job.read_metrics(named, [text.partition("=")[0] for text in system])
    job.compare(parse_systems(system, device, precision), lines, out, seed=seed, metrics=measured)
    typer.echo(f"{out / 'index.html'}")


@app.command()
def serve(
    student: Annotated[str | None, typer.Argument(help="pocket-student, pocket-teacher or a pipeline folder.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A teacher to show beside it, PATH or PATH@STEPS.")] = None,
    vote: Annotated[tuple[str, str] | None, typer.Option(help="Blind votes between two systems, A B, instead.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(callback=here, help="With --vote: a text file, one prompt a line.")
    ] = None,
    votes: Annotated[Path, typer.Option(callback=here, help="With --vote: the file that votes are added to.")] = Path(
        "votes.jsonl"
    ),
    history: Annotated[Path, typer.Option(callback=here, help="Where kept pictures go.")] = Path("history"),
    seed: Annotated[int, typer.Option(min=0, max=255, help="With --vote: the noises' set.")] = 255,
    host: Annotated[str, typer.Option(help="Another address than this lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 7860,
    device: DeviceOption = "cpu",
    precision: PrecisionOption = "float32",
) -> None:
    """Show a student's picture as its prompt is typed, or take blind votes, in a browser (needs the demo extra)."""
    if (student is None) == (vote is None):
        raise UserError("name a student to show, or two systems to vote on with --vote A B: one of the two")
    if vote is not None and prompts is None:
        raise UserError("--vote needs --prompts: a text file, one prompt a line")
    from diffusion2gan.compare import serve as job
    from diffusion2gan.pairs.make import read_prompts

    place: dict[str, Any] = {"host": host, "port": port, "device": device, "precision": precision}
    if vote is not None and prompts is not None:
        job.serve_vote(vote, read_prompts(prompts), votes, seed=seed, **place)
    elif student is not None:
        job.serve_student(student, teacher, history=history, **place)


@app.command()
def votes(file: Annotated[Path, typer.Argument(callback=here, help="What `serve --vote` has written.")]) -> None:
    """Which of two systems voters preferred, with a 95 % interval."""
    from diffusion2gan.compare.votes import summary

    for line in summary(file):
        typer.echo(line)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(callback=here, help="The folder for everything it makes.")] = Path("demo"),
    count: Annotated[int, typer.Option(min=2, help="Held-out captions to measure on.")] = 256,
    num_prompts: Annotated[int, typer.Option(min=1, help="Rows of the report.")] = 12,
    set_: SetOption = None,
) -> None:
    """All of it on the embedded teacher: pairs, distill, export, evaluate, compare. About ten minutes on two cores."""
    from diffusion2gan.demo import demo as job

    job(out, count=count, num_prompts=num_prompts, settings=set_ or [])


@perceptual_app.command("fit")
def perceptual_fit(
    images: Annotated[
        Path, typer.Option(callback=here, help="Class folders, IMAGES/<class>/*.png, or a Hugging Face dataset.")
    ],
    out: Annotated[Path, typer.Option(callback=here, help="The network's folder.")],
    vae: Annotated[str | None, typer.Option(help="`pocket`, the folder of a VAE or of a pipeline with one.")] = None,
    pixels: Annotated[bool, typer.Option("--pixels", help="The pixel twin: no VAE, three channels.")] = False,
    widths: Annotated[str, typer.Option(help="Channels of the five stages.")] = "64,128,256,512,512",
    size: Annotated[int, typer.Option(min=1, help="The pictures' side.")] = 256,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Train a feature network on the latents of labelled pictures; run again to continue. torchrun shares the work."""
    if pixels == (vae is not None):
        raise UserError("name the VAE whose latents are meant with --vae, or ask for --pixels: one of the two")
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
    triplets: Annotated[Path, typer.Option(callback=here, help="BAPPS's layout: FOLDER/<subset>/ref, p0, p1, judge.")],
    network: Annotated[str, typer.Option(help="`pocket` or a network's folder.")],
    out: Annotated[Path, typer.Option(callback=here, help="The calibrated network's folder.")],
    vae: Annotated[str | None, typer.Option(help="A latent network's VAE; none for a pixel network.")] = None,
    scored: Annotated[
        Path | None, typer.Option(callback=here, help="Triplets to score on; a held-out tenth if not given.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="The patches' side.")] = 64,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Fit a network's heads to two-alternative forced choices; run again to continue."""
    from diffusion2gan.perceptual.calibrate import calibrate

    result = calibrate(triplets, network, out, vae, scored, size, epochs, learning_rate, seed, device)
    for name, row in result.items():
        typer.echo(f"{name}: 2AFC {row['after']:.2%} (before: {row['before']:.2%}), {row['count']} triplets")


@perceptual_app.command("import")
def perceptual_import(
    file: Annotated[Path, typer.Argument(callback=here, help="The published checkpoint.")],
    format_: Annotated[str, typer.Option("--format", help="elatentlpips or snu.")],
    out: Annotated[Path, typer.Option(callback=here, help="The network's folder.")],
) -> None:
    """Turn published weights into a network of ours, with the settings that reproduce their formula."""
    from diffusion2gan.perceptual.importers import import_network

    for line in import_network(file, format_, out):
        typer.echo(line)


@pocket_app.command("triplets")
def pocket_triplets(
    out: Annotated[Path, typer.Option(callback=here, help="The folder of the triplets.")],
    count: Annotated[int, typer.Option(min=1, help="Triplets a sub-set.")] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write graded distortions of scenes in BAPPS's layout. The judgements are the grades', not people's."""
    from diffusion2gan.pocket.triplets import write_triplets

    write_triplets(out, count, seed)
    typer.echo(
        f"{out}: {count} triplets a sub-set. Next: diffusion2gan perceptual calibrate --triplets {out} "
        "--network pocket --vae pocket --out NAME"
    )


@pocket_app.command("train")
def pocket_train(
    out: Annotated[
        Path, typer.Option(callback=here, help="Checkpoints, and in out/weights the finished models.")
    ] = Path("pocket"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[float, typer.Option(min=0.0001, help="Multiplies the pictures each stage sees.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Train every pocket model from nothing; run again to continue."""
    from diffusion2gan.pocket.train import train

    train(out, seed=seed, scale=scale, device=device)


def main() -> None:
    """The console script: exit code 0 for done, 2 for the user's mistakes, 1 for failures, 130 for an interruption."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=True)
    except Diffusion2GANError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        again = "choose another place (--out), or make this one writable" if error.errno in UNWRITABLE else CONTINUE
        print(f"error: {error}. Nothing finished is lost; {again}.", file=sys.stderr)
        sys.exit(1)


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt
