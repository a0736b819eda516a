"""`diffusion2gan compare`: several systems side by side, on the same prompts and the same noise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion2gan import __version__
from diffusion2gan.compare.images import generate_images
from diffusion2gan.compare.report import write_report
from diffusion2gan.compare.table import METRICS, Column
from diffusion2gan.errors import UserError, nearest
from diffusion2gan.evaluate.protocols import check_same_protocol
from diffusion2gan.pipelines.image_folder import ImageFolder
from diffusion2gan.pipelines.system import System
from diffusion2gan.pipelines.timing import describe_machine
from diffusion2gan.runtime.files import read_json

MAX_PROMPTS = 500


def compare(
    systems: Mapping[str, System | ImageFolder],
    prompts: Sequence[str],
    out: Path,
    *,
    seed: int,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a report into `out`: one row per prompt, one column per system.

    In each row, all systems with the same latent shape start from the same noise. A folder of
    images can be one of the systems: its image i belongs to prompt i. Generated images are stored
    in `out/pictures`, so that a second call continues an interrupted one. `metrics`: what
    `evaluate` measured, by system name.

    Raises UserError if there is no system, if there are too many prompts, or if the metrics were
    measured with different protocols.
    """
    # Check everything that needs no model first
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give the name of a folder for the report")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"there are {len(prompts)} prompts, but a report has at most {MAX_PROMPTS}; "
            "use a shorter prompts file"
        )
    metrics = metrics or {}
    check_same_protocol({name: metrics[name] for name in systems if metrics.get(name)})

    # Generate the images
    images = generate_images(systems, prompts, seed, out / "pictures")

    # Write the report
    columns = [
        Column(name, images[name], metrics.get(name, {}), system.note)
        for name, system in systems.items()
    ]
    details = {"noise": describe_noise(systems, seed)}
    for name, system in systems.items():
        details[name] = describe_system(system)
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    details["written"] = f"{written}, by diffusion2gan {__version__}, {describe_machine()}"
    write_report(out, columns, prompts, details)


def describe_noise(systems: Mapping[str, System | ImageFolder], seed: int) -> str:
    """Which systems share their noise, and its seed, for the foot of the report."""
    shapes = {system.latent_shape for system in systems.values() if isinstance(system, System)}
    if len(shapes) < 2:
        shared_by = "the same for every system in a row"
    else:
        shared_by = "the same for systems with the same latent shape"
    return f"{shared_by}; drawn on the CPU from seed {seed}"


def describe_system(system: System | ImageFolder) -> str:
    """The settings that a system's images depend on, for the foot of the report."""
    if isinstance(system, ImageFolder):
        formats = "+".join(system.formats)
        return f"{len(system.files)} {formats} images, used as they are; content hash {system.key}"
    return f"weights {system.revision}, {system.note}, guidance scale {system.guidance_scale:g}"


def read_metrics(files: Mapping[str, str], systems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads the metrics.json of each system.

    `files`: paths by system name; `systems`: the names of all systems. Raises UserError if a name
    is not among the systems, or if a file does not contain the metrics of one system.
    """
    for name in files:
        if name not in systems:
            raise UserError(
                f"--metrics {name}: there is no --system with this name{nearest(name, systems)}"
            )

    metrics = {}
    for name, path in files.items():
        values = read_json(Path(path))
        if not isinstance(values, dict) or not any(metric.key in values for metric in METRICS):
            raise UserError(
                f"--metrics {name}: {path} does not contain the metrics of one system; "
                "`diffusion2gan evaluate` writes such a file"
            )
        metrics[name] = values
    return metrics
