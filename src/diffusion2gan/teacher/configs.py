"""A teacher from its configuration files alone: its sizes can be counted, nothing can be run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusion2gan import assets
from diffusion2gan.teacher import hub, strict_loading
from diffusion2gan.teacher.loading import check_can_teach, check_pipeline_folder, check_resolution
from diffusion2gan.teacher.pipeline import Teacher

# Components that a teacher runs without
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def config_folder(name: str, config: str | None = None) -> Path | None:
    """The folder with a teacher's configuration files, by its name; None for a file without one."""
    if name == "pocket":
        return assets.folder("teacher")
    if config is not None:
        return hub.find_model(config)[0]
    if name.endswith(".safetensors"):
        return None
    return hub.find_model(name)[0]


def find_missing_weights(folder: Path) -> str | None:
    """The first component of a pipeline folder that has a config but no weights, or None."""
    for name in hub.read_index(folder):
        path = folder / name
        is_model = (path / "config.json").is_file() and name not in LEFT_OUT
        if is_model and not any(path.glob("*.safetensors")):
            return name
    return None


def load_teacher_configs(folder: Path, name: str, resolution: int | None = None) -> Teacher:
    """The teacher in `folder` without its weights: its tensors have shapes, but no values.

    Its models are on torch's device `meta`; scheduler and tokenizers are loaded. Raises UserError
    if the folder is not a supported pipeline or lacks one of these files.
    """
    check_pipeline_folder(folder)
    index = hub.read_index(folder)

    # Components, and the settings of the pipeline itself
    components: dict[str, Any] = {}
    for key, value in index.items():
        if key.startswith("_"):
            continue
        if not isinstance(value, list):
            components[key] = value
        elif value[0] is None or key in LEFT_OUT:
            components[key] = None
        else:
            with strict_loading.translated_errors(f"the {key} in {folder}"):
                components[key] = load_component(folder / key, *value)
    if "safety_checker" in components:
        components["requires_safety_checker"] = False

    # The pipeline
    with strict_loading.translated_errors(f"the pipeline in {folder}"):
        pipeline = getattr(diffusers, index["_class_name"])(**components)
        check_can_teach(pipeline, folder)
        teacher = Teacher(pipeline, name, "not loaded", resolution, folder)
        check_resolution(teacher)
    return teacher


def load_component(folder: Path, library: str, class_name: str) -> Any:
    """A model on the device `meta`, from its config; a scheduler or tokenizer as it is."""
    kind = getattr(import_module(strict_loading.COMPONENT_MODULES[library]), class_name)
    if not (folder / "config.json").is_file():
        return kind.from_pretrained(folder, local_files_only=True)

    # A model of diffusers, or of transformers
    if library == "diffusers":
        config = kind.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            return kind.from_config(config)
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return kind(config)
