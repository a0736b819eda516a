"""`diffusion2gan compare`: several systems, the same prompts, the same noises, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion2gan.compare.report import Column, write_report
from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.systems import System, load_system
from diffusion2gan.pairs.store import noise_of, pair_seed
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.pipeline import warn_truncated

BATCH = 16
MAX_PROMPTS = 500


def compare(
    systems: Mapping[str, System], prompts: Sequence[str], out: Path, *, seed: int,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:  # fmt: skip
    """Writes `out/index.html` and `out/grid.png`. Noise i is the same for every system of one latent shape.

    `metrics`: what `evaluate` measured, by system name. Raises UserError with no system or too many prompts.
    """
    if len(prompts) > MAX_PROMPTS:
        raise UserError(f"{len(prompts)} prompts: a page holds at most {MAX_PROMPTS}; give a shorter file")
    measured = metrics or {}
    told = False
    columns = []
    with Bar("compare", len(systems) * len(prompts)) as bar:
        for name, system in systems.items():
            told = told or warn_truncated(system.pipeline.tokenizer, prompts)
            pictures: list[Image.Image] = []
            for start in range(0, len(prompts), BATCH):
                some = prompts[start : start + BATCH]
                seeds = [pair_seed(seed, start + i) for i in range(len(some))]
                made = system.generate(some, noise_of(seeds, system.latent_shape))
                pictures += [Image.fromarray(picture) for picture in made]
                bar.advance(len(some))
            columns.append(Column(name, pictures, _shown(measured.get(name, {})), system.note))
    details = {
        "noise": f"the same for every system in a row: CPU generator, set seed {seed}",
        **{f"{name}": f"weights {s.revision}, {s.note}, guidance {s.guidance_scale:g}" for name, s in systems.items()},
    }
    write_report(out, columns, prompts, details)


def _shown(metrics: Mapping[str, Any]) -> dict[str, float | int | str]:
    """The plain numbers; a system's distance of zero to itself is no merit and is left out."""
    plain = {key: value for key, value in metrics.items() if isinstance(value, float | int | str)}
    return {key: value for key, value in plain.items() if (key, value) != ("same_noise_distance", 0.0)}


def parse_systems(texts: Sequence[str]) -> dict[str, System]:
    """`NAME=PATH` … → systems. Raises UserError at a missing "=", a name given twice, or none at all."""
    systems: dict[str, System] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UserError(f"--system {text!r}: write it as NAME=PATH, such as student=export/student")
        if name in systems:
            raise UserError(f"--system {name}: given twice; every column needs its own name")
        systems[name] = load_system(path)
    if not systems:
        raise UserError("no --system given; name at least one as NAME=PATH")
    return systems
