"""The Python API: a function per job, with the options and the results of its command.

Jobs exchange data on disk, as the commands do, so functions and commands can be mixed. A long job
that was interrupted continues when the same function is called again. Wrong arguments raise
`diffusion2gan.errors.UserError`, whose message is the one that the command prints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from diffusion2gan.compare import compare as comparison
from diffusion2gan.compare.images import parse_system
from diffusion2gan.distill import train
from diffusion2gan.errors import UserError, nearest
from diffusion2gan.evaluate import run as evaluation
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.export import export as export_run
from diffusion2gan.pairs import make
from diffusion2gan.pocket import scenes
from diffusion2gan.prompts import read_prompts
from diffusion2gan.recipe import Recipe, load_recipe, parse_recipe
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.files import write_json
from diffusion2gan.runtime.storage import parse_location
from diffusion2gan.teacher import loading, saved
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.saved import DiffusionPipeline
from diffusion2gan.teacher.schedule import DEFAULT_SOLVER

PATH_OPTIONS = ("cache", "captions", "prompts", "reference", "inception")  # of EvaluateSettings


def load_teacher(
    teacher: str | Path | DiffusionPipeline = "pocket",
    device: str | torch.device = "auto",
    resolution: int | None = None,
    *,
    config: str | None = None,
    loras: str | None = None,
    vae: str | None = None,
) -> Teacher:
    """Loads a teacher, in float32: a frozen pipeline with `encode`, `denoise` and `decode`.

    `teacher`: `pocket` (the embedded teacher); the folder of a supported diffusers pipeline; a
        .safetensors file with the weights of one; a hub id, `org/name` or `org/name@revision`,
        which is looked up in this machine's hub cache; or a loaded `DiffusionPipeline`, which is
        saved once to `teachers/CLASS-REVISION` in the working directory and read from there, so
        that runs can be resumed and exported without it. Nothing is downloaded.
    `device`: `cpu`, `cuda`, …, or `auto`: `cuda` if there is a GPU, otherwise `cpu`.
    `resolution`: side of the images in pixels, the model's default if not given.
    `config`: for a single file, the pipeline folder with configs, scheduler and tokenizers.
    `loras`: LoRAs to merge into the weights, `PATH[@SCALE]`, separated by commas.
    `vae`: the folder of a VAE that replaces the pipeline's.

    Raises UserError if something does not exist, is not supported or does not fit.
    """
    name = _model_name(teacher)
    return loading.load_teacher(name, device, resolution, config=config, loras=loras, vae=vae)


def make_pairs(
    teacher: str | Path | DiffusionPipeline,
    prompts: str | Path | Sequence[str],
    out: str | Path,
    *,
    count: int = 1024,
    solver: str = DEFAULT_SOLVER,
    num_inference_steps: int | None = None,
    guidance_scale: float = 3.0,
    negative_prompt: str = "",
    seed: int = 0,
    precision: str = "float32",
    device: str = "auto",
    resolution: int | None = None,
    teacher_config: str | None = None,
    teacher_lora: str | None = None,
    vae: str | None = None,
    batch_size: int = 64,
    shard_size: int = 128,
    keep_noise: bool = False,
    offload: bool = False,
) -> Path | str:
    """Makes noise→image pairs with a teacher, as `diffusion2gan pairs` does; returns `out`.

    `teacher`: as for `load_teacher`; `teacher_config`, `teacher_lora`, `vae` and `resolution` are
        its `config`, `loras`, `vae` and `resolution`.
    `prompts`: a list of texts, the path of a file of any format that the command reads, `starter`
        for the prompts in the package, or `pocket` for the captions of the embedded teacher's
        world. A list shorter than `count` is repeated.
    `out`: the folder of the set, or a URL such as s3://bucket/set. Shards that are there are kept,
        so calling the function again continues.
    `count`: the number of pairs. `seed`, 0 to 255: sets of different seeds share no noise.
    `solver`: `dpm++` or `ddim` (Euler for flow models), with `num_inference_steps` steps; by
        default 50 for ddim, 20 for dpm++ (30 for flow models, 40 with zero terminal SNR).
    `guidance_scale`, `negative_prompt`: the teacher's classifier-free guidance.
    `precision`: of the denoising network, float32, bfloat16 or float16; the solver is in float32.
    `batch_size` affects the speed alone, `shard_size` is the number of pairs per file, `keep_noise`
        stores the noise beside its seed, and `offload` keeps the VAE and the text encoders on the
        CPU while they are not needed.

    Raises UserError if an argument is not valid or `out` contains another set.
    """
    # Prompts and location are checked before the teacher is loaded
    is_pocket = prompts == "pocket"
    source = scenes.pairs_captions(seed) if is_pocket else _read_texts(prompts, "prompts")
    location = parse_location(str(out))
    torch_device = resolve_device(device, "give device='cpu'")

    # The teacher and the description of the set
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
    spec = make.build_spec(loaded, source, settings, prompts_name=str(prompts))

    make.make_pairs(loaded, source, spec, location, batch_size, offload=offload)
    return out


def distill(
    recipe: str | Path | Recipe,
    pairs: str | Path,
    out: str | Path,
    *,
    teacher: str | Path | DiffusionPipeline | None = None,
    allow_change: Sequence[str] = (),
    sample_prompts: str | Path | Sequence[str] = (),
    trackers: Sequence[str] = (),
    **settings: Any,
) -> Path:
    """Trains a one-step student on pairs, as `diffusion2gan distill` does; returns `out`.

    `recipe`: the name of a shipped recipe (`diffusion2gan recipe list`), a .toml file or a
        `Recipe`.
    `pairs`: the folder or URL of the pairs.
    `out`: the run's folder. A run that is there is resumed exactly.
    `teacher`: the teacher that made the pairs, as for `load_teacher`; the recipe's if not given.
    `allow_change`: settings that may differ from those of the run in `out`, because they change
        updates by rounding alone.
    `sample_prompts`: a list of texts or the path of a text file: sampled too, and shown on the
        run's page, `out/index.html`, which is written while the run trains.
    `trackers`: any of `tensorboard`, `wandb` and `trackio`, which also receive the log.
    `settings`: settings of the recipe to change, such as `total_pairs=10_000`; all of them are
        fields of `Recipe`.

    Ctrl-C saves the run and raises KeyboardInterrupt; SIGTERM saves it and ends the process. Raises
    UserError if a setting, the teacher, the pairs or the run in `out` do not fit each other.
    """
    # The recipe with its changes
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(str(recipe))
    values = recipe.model_dump() | settings
    if teacher is not None:
        values["teacher"] = _model_name(teacher)
    changed = parse_recipe(values, "distill")

    texts: Sequence[str] = ()
    if sample_prompts:
        texts = _read_texts(sample_prompts, "sample_prompts")

    # The run
    folder = _local_path(out, "out")
    train.distill(changed, parse_location(str(pairs)), folder, allow_change, texts, list(trackers))
    return folder


def export(
    run: str | Path,
    out: str | Path,
    *,
    half: bool = False,
    overwrite: bool = False,
    metrics: str | Path | None = None,
) -> Path:
    """Writes a run's student as a pipeline folder for stock diffusers; returns `out`.

    `run`: a run's folder, or one of its checkpoints.
    `out`: the folder to write, atomically.
    `half`: float16 weights instead of float32.
    `overwrite`: replaces the export of another run in `out`.
    `metrics`: the file that `evaluate` wrote, for the model card.

    `DiffusionPipeline.from_pretrained(out)` loads it. It generates an image in one step, called
    with `num_inference_steps=1, guidance_scale=0`. Raises UserError if there is no run, or `out`
    contains something else.
    """
    folder = _local_path(out, "out")
    metrics_file = None if metrics is None else _local_path(metrics, "metrics")
    dtype = torch.float16 if half else torch.float32
    export_run(_local_path(run, "run"), folder, dtype, overwrite=overwrite, metrics=metrics_file)
    return folder


def evaluate(
    system: str | Path | DiffusionPipeline, out: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Measures a system's images by a protocol, as `diffusion2gan evaluate` does.

    `system`: `pocket-teacher`, `pocket-student`, the folder of a pipeline or of an export, a folder
        of images named by caption index, a published system `ROW=FOLDER[+FILE]`, or a loaded
        `DiffusionPipeline`, which is saved as by `load_teacher`.
    `out`: a JSON file to write the metrics to; none if not given.
    `options`: the options of the command with underscores, such as `count=500`, `device="cuda"` or
        `prompts="prompts.txt"`: the fields of `EvaluateSettings`. `cache`, the folder in which
        images and features are kept, is by default `pictures` beside `out`.

    Returns the metrics by name, as in metrics.json. Raises UserError if an option is unknown or not
    used by the protocol, or the system does not fit it.
    """
    # Options
    known = {field.name for field in fields(EvaluateSettings)} - {"system"}
    for name in options:
        if name not in known:
            raise UserError(f"evaluate has no option {name!r}{nearest(name, known)}")
    for name in PATH_OPTIONS:
        if options.get(name) is not None:
            options[name] = _local_path(options[name], name)
    file = _local_path(out, "out") if out is not None else None
    if options.get("cache") is None:
        options["cache"] = (file.parent if file is not None else Path()) / "pictures"

    # Measure
    metrics = evaluation.evaluate(EvaluateSettings(system=_model_name(system), **options))
    if metrics and file is not None:
        write_json(file, metrics)
    return metrics


def compare(
    systems: Mapping[str, str | Path | DiffusionPipeline],
    prompts: str | Path | Sequence[str],
    out: str | Path,
    *,
    metrics: Mapping[str, Mapping[str, Any] | str | Path] | None = None,
    seed: int = 255,
    device: str = "auto",
    precision: str = "float32",
) -> Path:
    """Writes a page with the images of several systems, as `diffusion2gan compare` does.

    `systems`: by the name of its column, a system as for `evaluate`; `FOLDER@STEPS` for a number of
        sampling steps.
    `prompts`: a list of texts, or the path of a text file with one per line: the rows of the page.
    `out`: the folder of the report.
    `metrics`: by system, what `evaluate` returned, or the file that it wrote.
    `seed`: of the noise, which all systems share.

    Returns the page, `out/index.html`. Raises UserError if a system, the prompts or the metrics are
    not valid.
    """
    # Prompts and metrics are checked before the systems are loaded
    folder = _local_path(out, "out")
    texts = _read_texts(prompts, "prompts")
    measured: dict[str, Mapping[str, Any]] = {}
    files: dict[str, str] = {}
    for name, source in (metrics or {}).items():
        if name not in systems:
            raise UserError(f"metrics: there is no system {name!r}{nearest(name, systems)}")
        if isinstance(source, Mapping):
            measured[name] = source
        else:
            files[name] = str(source)
    measured.update(comparison.read_metrics(files, list(systems)))

    # Load the systems and compare them
    loaded = {
        name: parse_system(_model_name(system), device, precision)
        for name, system in systems.items()
    }
    comparison.compare(loaded, texts, folder, seed=seed, metrics=measured)
    return folder / "index.html"


def _model_name(model: str | Path | DiffusionPipeline) -> str:
    """The name by which jobs load a model: a string or path as it is, a pipeline's saved folder."""
    if isinstance(model, str | Path):
        return str(model)
    return str(saved.save_pipeline(model))


def _read_texts(prompts: str | Path | Sequence[str], name: str) -> Sequence[str]:
    """Prompts from a list or a text file."""
    if isinstance(prompts, str | Path):
        return read_prompts(_local_path(prompts, name))
    if not prompts:
        raise UserError(f"{name}: the list is empty; give at least one prompt")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{name}: number {index} is {prompt!r}; every prompt must be a text")
    return prompts


def _local_path(path: str | Path, name: str) -> Path:
    """`path` as a Path. Raises UserError if it is a URL, which would name a folder `s3:`."""
    if re.match(r"\w[\w+.-]+:/", str(path)):
        raise UserError(
            f"{name} {path} is a URL, but this must be a path on this machine. Only the pairs may "
            "be at a URL."
        )
    return Path(path).expanduser()
