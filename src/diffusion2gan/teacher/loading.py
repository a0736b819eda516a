"""Finds, checks and loads a teacher."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusion2gan import assets
from diffusion2gan.errors import UserError
from diffusion2gan.runtime import integrity
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.files import read_json
from diffusion2gan.teacher import hub, strict_loading, variants
from diffusion2gan.teacher.families import FAMILIES, REFUSED
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.schedule import PREDICTIONS

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_teacher(
    name: str = "pocket",
    device: str | torch.device = "cpu",
    resolution: int | None = None,
    *,
    config: str | None = None,
    loras: str | None = None,
    vae: str | None = None,
) -> Teacher:
    """Loads a teacher in float32.

    `name`: `pocket` (the embedded teacher); the folder of a supported diffusers pipeline; a
        .safetensors file with the weights of one; or a hub id, `org/name` or `org/name@revision`,
        which is looked up in this machine's hub cache. Nothing is downloaded.
    `resolution`: side of the images in pixels, the model's default if not given.
    `config`: for a single file, the pipeline folder with configs, scheduler and tokenizers.
    `loras`: LoRAs to merge into the weights, `PATH[@SCALE]`, separated by commas.
    `vae`: a VAE that replaces the pipeline's.

    Raises UserError if something does not exist, is not supported or does not fit.
    """
    if isinstance(device, str):
        device = resolve_device(device, "give --device cpu")

    # 1. Where the model is
    single_file = variants.is_single_file(name)
    config_folder = hub.find_model(config)[0] if config is not None else None
    if name == "pocket":
        source = assets.folder("teacher")
        display_name = name
    elif single_file:
        source = Path(name).expanduser()
        display_name = source.name
    else:
        source, display_name = hub.find_model(name)

    # 2. The pipeline
    if single_file:
        pipeline_class = check_pipeline_folder(config_folder) if config_folder is not None else None
        pipeline = variants.load_single_file(source, config_folder, pipeline_class)
        pipeline.set_progress_bar_config(disable=True)
    else:
        check_pipeline_folder(source)
        pipeline = load_pipeline(source)
    with strict_loading.translated_errors(f"the teacher {name}"):
        check_can_teach(pipeline, source)

    index_folder = source if not single_file else config_folder
    sources = find_sources(pipeline, index_folder, single_file)

    # 3. Changes to its weights
    if loras:
        for name in variants.merge_loras(pipeline, loras):
            sources.pop(name, None)
    if vae:
        sources.pop("vae", None)
        vae_folder = variants.replace_vae(pipeline, vae)
        if strict_loading.is_stock_layout(vae_folder):
            sources["vae"] = vae_folder

    # 4. The teacher
    revision = variants.compute_revision(source, config_folder, loras, vae)
    pipeline.to(device)
    with strict_loading.translated_errors(f"the teacher {name}"):
        teacher = Teacher(
            pipeline, display_name, revision, resolution, source, index_folder, sources
        )
        check_resolution(teacher)
    return teacher


def check_pipeline_folder(folder: Path) -> str:
    """The pipeline class named in a folder's `model_index.json`.

    Raises UserError if there is none, if it is not supported, or if it needs custom code.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        reason = "has no model_index.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"{folder} is not a diffusers pipeline: it {reason}. Give `pocket`, a folder that "
            "`DiffusionPipeline.save_pretrained` wrote, or the id of a model in the hub's cache, "
            "such as org/name."
        )
    try:
        pipeline_class = str(read_json(index)["_class_name"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(
            f"{index} does not name a pipeline class ({error}); save the pipeline again."
        ) from error

    hub.check_no_custom_code(folder)
    if pipeline_class not in FAMILIES:
        reason = f" ({REFUSED[pipeline_class]})" if pipeline_class in REFUSED else ""
        raise UserError(
            f"{folder} is a {pipeline_class}{reason}, which is not supported; supported: "
            f"{', '.join(FAMILIES)}. Convert it, choose another teacher, or add support for its "
            "class as CONTRIBUTING.md describes."
        )
    return pipeline_class


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """Loads a pipeline from disk alone: float32, safetensors only, no custom code.

    Stable Diffusion's safety checker is left out. `folder` must have a `model_index.json`; whether
    its class is supported is checked by `check_pipeline_folder`. Raises UserError if the pipeline
    is incomplete or does not load.
    """
    hub.check_no_custom_code(folder)
    options: dict[str, Any] = absent_components(folder)
    index = hub.read_index(folder)
    if index["_class_name"] == "StableDiffusionPipeline":
        options["safety_checker"] = None
        options["requires_safety_checker"] = False
    check_complete(folder, index, options)
    check_scheduler_settings(folder)
    check_digests(folder)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return strict_loading.load_pipeline(DiffusionPipeline, folder, options)


def check_scheduler_settings(folder: Path) -> None:
    """Raises UserError if the scheduler's file has no settings, instead of using default ones.

    Every scheduler that diffusers has saved names its class.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    if isinstance(config, dict) and "_class_name" not in config:
        raise UserError(
            f"{path} does not name a scheduler (it has no _class_name), so its noise levels would "
            "be diffusers' default ones. Restore it from a copy of the pipeline."
        )


def check_digests(folder: Path) -> None:
    """Raises Failure if a file of an export differs from its digest in diffusion2gan.json.

    Does nothing for other folders, and for exports of earlier versions, which have no digests.
    """
    path = folder / "diffusion2gan.json"
    if not path.is_file():
        return
    description = read_json(path)
    digests = description.get("sha256") if isinstance(description, dict) else None
    if isinstance(digests, dict):
        integrity.check_files(
            folder,
            {name: str(digest) for name, digest in digests.items()},
            "Restore it from a copy, or export the run again. If you changed it on purpose, set "
            f"{integrity.VARIABLE}=0 in the environment to use it as it is.",
        )


def find_sources(pipeline: Any, folder: Path | None, single_file: bool) -> dict[str, Path]:
    """The components of a pipeline in `folder` that stock diffusers reads from the same files.

    `single_file`: the network, or all models of a UNet pipeline, came from a file instead.
    """
    sources: dict[str, Path] = {}
    if folder is None:
        return sources
    network = FAMILIES[type(pipeline).__name__].network
    for name, component in pipeline.components.items():
        if component is None or not (folder / name).is_dir():
            continue
        is_model = isinstance(component, torch.nn.Module)
        from_file = single_file and (network == "unet" or name == network)
        if is_model and (from_file or not strict_loading.is_stock_layout(folder / name)):
            continue
        sources[name] = folder / name
    return sources


def absent_components(folder: Path) -> dict[str, None]:
    """The components that `model_index.json` marks as absent, such as SD3's T5 encoder.

    `from_pretrained` needs them as arguments, each None.
    """
    index = hub.read_index(folder)
    absent: dict[str, None] = {}
    for name, value in index.items():
        if isinstance(value, list) and value[0] is None:
            absent[name] = None
    return absent


def check_complete(folder: Path, index: dict[str, Any], left_out: dict[str, Any]) -> None:
    """Raises UserError if a component of `index`, other than `left_out`, has no folder."""
    for name, value in index.items():
        is_component = isinstance(value, list) and not name.startswith("_")
        if not is_component or name in left_out or (folder / name).is_dir():
            continue
        hint = ""
        if name.endswith("_3"):
            hint = (
                " Stable Diffusion 3 also runs without its third text encoder: for that, set "
                "text_encoder_3 and tokenizer_3 to [null, null] in model_index.json."
            )
        raise UserError(
            f"{folder} has no {name}, which its model_index.json names: the pipeline was not "
            f"copied or downloaded completely.{hint}"
        )


def check_can_teach(pipeline: Any, folder: Path) -> None:
    """Raises UserError if a pipeline of a supported class contains a model that cannot teach."""
    check_noise_schedule(pipeline, folder)
    check_token_limits(pipeline, folder)
    family = FAMILIES[type(pipeline).__name__]
    scheduler = pipeline.scheduler.config
    network = getattr(pipeline, family.network).config

    # Prediction type. Flow schedulers without the setting report diffusers' default, "epsilon".
    prediction = scheduler.get("prediction_type", "epsilon")
    supported = ("epsilon", "flow_prediction") if family.flow else PREDICTIONS[:3]
    if prediction not in supported:
        raise UserError(f"{folder} predicts {prediction!r}; supported: {', '.join(supported)}.")
    if prediction == "epsilon" and scheduler.get("rescale_betas_zero_snr", False):
        raise UserError(
            f"{folder} predicts ε with zero terminal SNR. At its last timestep the input is pure "
            "noise, so ε carries no information about the image. Correct its "
            "scheduler_config.json: either prediction_type: v_prediction, or "
            "rescale_betas_zero_snr: false."
        )

    # Not a text-to-image model that starts from noise
    if "text_encoder" in pipeline.components and pipeline.text_encoder is None:
        raise UserError(
            f"{folder} has no text_encoder: it is the SDXL refiner, or incomplete; give the base "
            "model's pipeline."
        )
    if getattr(network, "time_cond_proj_dim", None) is not None:
        raise UserError(
            f"{folder} is already distilled (its network takes the guidance scale as an input); "
            "give the model it was distilled from."
        )
    input_channels = network.in_channels // family.packed**2
    latent_channels = pipeline.vae.config.latent_channels
    if input_channels != latent_channels:
        raise UserError(
            f"the network of {folder} takes {input_channels} channels, but its VAE has "
            f"{latent_channels}: it is an inpainting or editing model; give a text-to-image one."
        )


def check_noise_schedule(pipeline: Any, folder: Path) -> None:
    """Raises UserError if the noise levels of a pipeline's scheduler do not fit its class.

    A UNet's are given by betas, a flow model's by σ from 0 to 1. Another scheduler's settings would
    be read as diffusers' default betas, without an error.
    """
    scheduler = pipeline.scheduler
    config = scheduler.config
    name = type(scheduler).__name__
    family = FAMILIES.get(type(pipeline).__name__)

    is_flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    if family is not None and family.flow:
        if not is_flow:
            raise UserError(
                f"the scheduler of {folder} is {name}, but {type(pipeline).__name__} is a flow "
                "model, whose noise levels it does not have. Give the pipeline its own scheduler, "
                "such as FlowMatchEulerDiscreteScheduler."
            )
        return

    if is_flow:
        reason = "a flow model's"
    elif "beta_schedule" not in config:
        reason = "not given by betas, as EDM's are"
    elif config.get("timestep_type") == "continuous" or config.get("sigma_max") is not None:
        reason = "continuous, as EDM's are (timestep_type, sigma_max)"
    else:
        return
    raise UserError(
        f"the scheduler of {folder} is {name}, and its noise levels are {reason}. This is not "
        f"supported for {type(pipeline).__name__}: if the model was trained so, choose another "
        "one; if not, give it its own scheduler, such as DDIMScheduler with its betas."
    )


def check_token_limits(pipeline: Any, folder: Path) -> None:
    """Raises UserError if a CLIP tokenizer's limit is more than its text encoder's positions.

    The pipelines pad to the tokenizer's limit, which without `model_max_length` is 10³⁰.
    """
    for name, tokenizer in pipeline.components.items():
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        if not name.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        is_clip = str(getattr(encoder.config, "model_type", "")).startswith("clip")
        positions = getattr(encoder.config, "max_position_embeddings", None)
        if not is_clip or positions is None or tokenizer.model_max_length <= positions:
            continue
        limit = tokenizer.model_max_length
        stated = f"model_max_length {limit}" if limit < 10**9 else "no model_max_length"
        raise UserError(
            f"{folder / name} has {stated}, but its text encoder has {positions} positions, and "
            f'prompts are padded to that length. Write "model_max_length": {positions} into '
            f"{folder / name / 'tokenizer_config.json'}."
        )


def check_resolution(teacher: Teacher) -> None:
    """Raises UserError if the requested resolution is not a multiple of the network's patches."""
    if teacher.resolution is None:
        return
    patch = teacher.family.packed * getattr(teacher.network.config, "patch_size", 1)
    unit = teacher.spatial_factor * patch
    if teacher.resolution <= 0 or teacher.resolution % unit:
        raise UserError(
            f"resolution {teacher.resolution} does not fit {teacher.name}: it must be a positive "
            f"multiple of {unit} pixels."
        )
