"""`diffusion2gan compare`: several systems, the same prompts, the same noises, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion2gan.compare.pictures import make_pictures
from diffusion2gan.compare.report import write_report
from diffusion2gan.compare.table import METRICS, Column
from diffusion2gan.errors import UserError, nearest
from diffusion2gan.evaluate.protocols import check_same
from diffusion2gan.pipelines.image_folder import ImageFolder
from diffusion2gan.pipelines.system import System
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
    """Writes the report of `prompts` into `out`. Noise i is the same for every system of one latent shape.

    A folder of pictures may stand among the systems: picture i is prompt i's.
    `metrics`: what `evaluate` measured, by system name. Finished pictures are kept in `out/pictures`. Raises UserError
    with no system, too many prompts, or numbers of different protocols.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name the folder of the report")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{len(prompts)} prompts: a page holds at most {MAX_PROMPTS}; give a shorter file"
        )
    measured = metrics or {}
    check_same({name: measured[name] for name in systems if measured.get(name)})
    pictures = make_pictures(systems, prompts, seed, out / "pictures")
    columns = [
        Column(name, pictures[name], measured.get(name, {}), systems[name].note) for name in systems
    ]
    shapes = {system.latent_shape for system in systems.values() if isinstance(system, System)}
    same = (
        "the same for every system in a row"
        if len(shapes) < 2
        else "the same for systems of one latent shape"
    )
    details = {
        "noise": f"{same}: CPU generator, set seed {seed}",
        **{name: _told(system) for name, system in systems.items()},
    }
    write_report(out, columns, prompts, details)


def _told(system: System | ImageFolder) -> str:
    if isinstance(system, ImageFolder):
        return f"{len(system.files)} {'+'.join(system.formats)} pictures as they are, contents {system.key}"
    return f"weights {system.revision}, {system.note}, guidance {system.guidance_scale:g}"


def read_metrics(named: Mapping[str, str], systems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each system's `metrics.json`. Raises UserError where a name is no system's, or a file holds no such thing."""
    for name in named:
        if name not in systems:
            raise UserError(f"--metrics {name}: no --system has this name{nearest(name, systems)}")
    found = {name: read_json(Path(path)) for name, path in named.items()}
    for name, metrics in found.items():
        if not isinstance(metrics, dict) or not any(metric.key in metrics for metric in METRICS):
            raise UserError(
                f"{named[name]} holds no metrics of one system; `diffusion2gan evaluate` writes such a file"
            )
    return found
