"""Whether a job can be measured on this machine, and the memory that is free on it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from diffusion2gan.errors import UserError
from diffusion2gan.teacher.configs import (
    config_folder,
    find_missing_weights,
    load_teacher_configs,
)
from diffusion2gan.teacher.pipeline import Teacher

GIB = 2**30


def load_counted_teacher(
    name: str, config: str | None, resolution: int | None
) -> tuple[Teacher | None, str | None]:
    """(the teacher without weights, why it cannot be measured: a component without weights).

    The teacher is None if its configuration files are inside a single file or not found: loading it
    in full then reports what is missing.
    """
    try:
        folder = config_folder(name, config)
    except UserError:
        return None, None
    if folder is None or not (folder / "model_index.json").is_file():
        return None, None

    teacher = load_teacher_configs(folder, name, resolution)
    is_single_file = name.endswith(".safetensors")
    missing = None if is_single_file else find_missing_weights(folder)
    if missing is None:
        return teacher, None
    return teacher, f"{folder} has no weights of its {missing}"


def reason_too_large(num_bytes: int, device: torch.device) -> str | None:
    """Why `num_bytes` do not fit into the device's free memory; None if they do, or maybe."""
    available = available_bytes(device)
    if available is None or num_bytes <= available:
        return None
    return (
        f"it needs {num_bytes / GIB:.1f} GiB without activations, and {device.type} has "
        f"{available / GIB:.1f} GiB free"
    )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, or of the machine on Linux; None if it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
