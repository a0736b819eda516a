"""Finding, checking and loading a teacher."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusion2gan import assets
from diffusion2gan.errors import UserError
from diffusion2gan.teacher import hub, variants
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
    """`pocket`, the folder of a supported diffusers pipeline, a .safetensors of one's weights, or a hub's id: float32.

    `resolution`, the pictures' side in pixels, is the model's own if not given. `config` is a single file's pipeline
    folder; `loras`, `PATH[@SCALE]` with commas between, are merged into the weights; `vae` takes the VAE's place.
    An id, `org/name` or `org/name@revision`, is looked up in the hub's cache on this machine; nothing is downloaded.
    Raises UserError where something is not there, is not supported, or does not fit.
    """
    single, base = (
        variants.is_single_file(name),
        hub.find(config)[0] if config is not None else None,
    )
    if name == "pocket":
        source, told = assets.folder("teacher"), name
    else:
        source, told = (Path(name), Path(name).name) if single else hub.find(name)
    if single:
        family = check_pipeline_folder(base) if base is not None else None
        pipeline = variants.load_single_file(source, base, family)
        pipeline.set_progress_bar_config(disable=True)
    else:
        check_pipeline_folder(source)
        pipeline = load_pipeline(source)
    check_family(pipeline, source)
    if loras and variants.has_peft():
        variants.merge_loras(pipeline, loras)
    if vae:
        variants.replace_vae(pipeline, vae)
    revision = variants.revision_of(source, base, loras, vae)
    teacher = Teacher(pipeline.to(device), told, revision, resolution, source)
    check_resolution(teacher)
    return teacher


def check_pipeline_folder(folder: Path) -> str:
    """The class name in `model_index.json`. Raises UserError where there is none or it is not supported."""
    index = folder / "model_index.json"
    if not index.is_file():
        what = "is not a folder" if not folder.is_dir() else "has no model_index.json"
        raise UserError(
            f"{folder} is no diffusers pipeline: it {what}. Give `pocket` or a folder that "
            "`DiffusionPipeline.save_pretrained` wrote, or the id of a model in the hub's cache, such as org/name."
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{index} does not name a pipeline class ({error}); save the pipeline again."
        ) from error
    hub.check_no_code(folder)
    if (name := str(name)) not in FAMILIES:
        what = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise UserError(
            f"{folder} is a {name}{what}, which is not supported; supported: {', '.join(FAMILIES)}. Convert it, choose "
            "another teacher, or add its family: CONTRIBUTING.md shows how."
        )
    return name


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained` from disk alone: float32, safetensors only, no remote code, no checker.

    `folder` has a `model_index.json`; which classes may teach is `check_pipeline_folder`'s to say.
    """
    hub.check_no_code(folder)
    options: dict[str, Any] = absent_parts(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index["_class_name"] == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    check_whole(folder, index, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                **options,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"the pipeline in {folder} does not load: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_whole(folder: Path, index: dict[str, Any], without: dict[str, Any]) -> None:
    """Raises UserError where a part that `index` names has no folder."""
    parts = [name for name, kind in index.items() if isinstance(kind, list) and name not in without]
    missing = [name for name in parts if not name.startswith("_") and not (folder / name).is_dir()]
    if not missing:
        return
    optional = " Stable Diffusion 3 runs without its third encoder: write text_encoder_3 and tokenizer_3 as [null, null]"
    raise UserError(
        f"{folder} has no {missing[0]}, which its model_index.json names: it was not copied or downloaded whole."
        + (f"{optional} there." if missing[0].endswith("_3") else "")
    )


def absent_parts(folder: Path) -> dict[str, None]:
    """Those that a folder says it is without, as SD3's T5: `from_pretrained` must be told so again."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {
        name: None for name, kind in index.items() if isinstance(kind, list) and kind[0] is None
    }


def check_family(pipeline: Any, folder: Path) -> None:
    """Raises UserError where a pipeline of a supported class holds a model that cannot teach."""
    family = FAMILIES[type(pipeline).__name__]
    config, network = pipeline.scheduler.config, getattr(pipeline, family.network).config
    prediction = config.get("prediction_type", "epsilon")
    known = (
        PREDICTIONS[:3] if not family.flow else ("epsilon", "flow_prediction")
    )  # "epsilon": not said
    if prediction not in known:
        raise UserError(f"{folder} predicts {prediction!r}; supported: {', '.join(known)}.")
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr", False):
        raise UserError(
            f"{folder} predicts ε with zero terminal SNR, where ε says nothing of the picture at the last timestep; "
            "its scheduler_config.json should say v_prediction, or rescale_betas_zero_snr: false."
        )
    if "text_encoder" in pipeline.components and pipeline.text_encoder is None:
        raise UserError(
            f"{folder} has no text_encoder: it is the SDXL refiner, or not whole; give the base model's pipeline."
        )
    if getattr(network, "time_cond_proj_dim", None) is not None:
        raise UserError(
            f"{folder} is already distilled (its network reads a guidance scale); give its own teacher."
        )
    channels, latents = network.in_channels // family.packed**2, pipeline.vae.config.latent_channels
    if channels != latents:
        raise UserError(
            f"{folder} takes {channels} channels, its VAE makes {latents}: it is an inpainting or editing model; give "
            "a text-to-image one."
        )


def check_resolution(teacher: Teacher) -> None:
    """Raises UserError where the asked resolution is no whole number of the network's patches."""
    patch = teacher.family.packed * getattr(teacher.network.config, "patch_size", 1)
    unit = teacher.spatial_factor * patch
    if teacher.resolution is not None and (teacher.resolution <= 0 or teacher.resolution % unit):
        raise UserError(
            f"resolution {teacher.resolution}: {teacher.name} makes pictures in steps of {unit} pixels."
        )
