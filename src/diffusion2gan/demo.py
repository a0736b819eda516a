"""`diffusion2gan demo`: the whole corridor on the pocket teacher, from pairs to a report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusion2gan import assets
from diffusion2gan.compare.compare import compare
from diffusion2gan.distill.train import distill
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.export import export
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import SPEC_FILE, open_set
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.recipe import load_recipe
from diffusion2gan.runtime.files import atomic_write, write_json
from diffusion2gan.runtime.progress import console
from diffusion2gan.teacher.loading import load_teacher

SHOWN_WORLD, SHOWN_NOISE = (
    2000,
    255,
)  # prompts and noises of the report: neither trained nor measured on


def demo(out: Path, *, count: int, num_prompts: int, settings: list[str]) -> dict[str, Any]:
    """Makes pairs beside the shipped ones, trains, exports, evaluates on `count` captions and compares.

    Returns what it writes to `out/metrics.json`. Every step continues where it was interrupted.
    """
    say(1, "pairs: the rest of the shipped set, made here by the 50-step teacher")
    pairs = out / "pairs"
    complete_shipped_pairs(pairs)

    say(2, "distill: a one-step student from the teacher's weights")
    distill(load_recipe("pocket-demo", settings), pairs, out / "run")
    say(3, "export: an ordinary pipeline folder")
    export(out / "run", out / "export")

    say(4, f"evaluate: {count} held-out captions each")
    named: dict[str, tuple[str, int | None, float | None]] = {
        "teacher": ("pocket-teacher", None, None),
        "student_demo": (str(out / "export"), None, None),
        "student": ("pocket-student", None, None),
        "teacher_one_step": ("pocket-teacher", 1, None),
    }
    metrics = {
        "systems": {
            name: evaluate(
                path,
                count=count,
                seed=0,
                cache=out / "pictures",
                num_inference_steps=steps,
                guidance_scale=guidance,
            )
            for name, (path, steps, guidance) in named.items()
        }
    }
    write_json(out / "metrics.json", metrics)

    say(5, "compare: the report")
    systems = {name: load_system(*args) for name, args in named.items()}
    prompts = scenes.captions(range(num_prompts), SHOWN_WORLD)
    compare(systems, prompts, out, seed=SHOWN_NOISE, metrics=metrics["systems"])
    console.print(
        f"Done. Open {out / 'index.html'}; the numbers are in {out / 'metrics.json'}.",
        soft_wrap=True,
    )
    return metrics


def complete_shipped_pairs(folder: Path) -> None:
    """Copies the shipped shards into `folder` and makes the set's remaining ones there."""
    if not (folder / SPEC_FILE).exists():
        with atomic_write(folder) as temporary:
            shutil.copytree(assets.folder("pairs"), temporary)
    spec = open_set(folder)
    world = assets.pairs_world(spec.seed)
    make_pairs(load_teacher(), lambda indices: scenes.captions(indices, world), spec, folder)


def say(number: int, what: str) -> None:
    console.rule(f"{number}/5 {what}", align="left")
