"""Pipelines in memory as teachers: saved once, to a folder named by a digest of their weights.

Jobs exchange data on disk, and a run is resumed by the revision of its teacher, so a teacher has to
be a folder. A pipeline's folder is found again by its content.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline as DiffusionPipeline
from torch import nn

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import atomic_write, delete, sha256
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.teacher.families import FAMILIES

ROOT = Path("teachers")  # in the working directory


def save_pipeline(pipeline: Any, root: Path = ROOT) -> Path:
    """Saves a diffusers pipeline to `root/CLASS-REVISION`; returns that folder.

    The revision is the digest of its weights and scheduler, the same that pairs and runs record. A
    folder that exists is used as it is, so a second call with the same pipeline gives the same
    folder. Raises UserError if the object is not a supported pipeline, if it has LoRAs that are not
    merged, or if its weights are not in memory.
    """
    check_can_be_saved(pipeline)
    name = type(pipeline).__name__
    written = root / name
    with exclusive_lock(written):
        # Write it under its class, then name it by its content
        with atomic_write(written) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline.save_pretrained(temporary, safe_serialization=True)
        folder = root / f"{name}-{sha256(written)[:16]}"
        if folder.exists():
            delete(written)  # it was saved before
        else:
            os.replace(written, folder)
    return folder


def check_can_be_saved(pipeline: Any) -> None:
    """Raises UserError if `pipeline`, once saved, would not be the teacher that it is in memory."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise UserError(
            f"a {name} cannot be a teacher. Give `pocket`, a folder, a .safetensors file, a hub "
            f"id, or a pipeline of one of these classes: {', '.join(FAMILIES)}."
        )

    for component_name, component in pipeline.components.items():
        if not isinstance(component, nn.Module):
            continue
        adapters: Any = getattr(component, "peft_config", None)
        if adapters:
            raise UserError(
                f"the pipeline's {component_name} has LoRAs that are not merged "
                f"({', '.join(adapters)}). Merge them first: pipe.fuse_lora(), then "
                "pipe.unload_lora_weights()."
            )
        if any(parameter.is_meta for parameter in component.parameters()):
            raise UserError(
                f"weights of the pipeline's {component_name} are not in memory, because it is "
                "offloaded piece by piece. Load the pipeline without enable_sequential_cpu_offload."
            )
