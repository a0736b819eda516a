"""`diffusion2gan demo`: every stage of the method on the pocket teacher, from pairs to a report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusion2gan import assets
from diffusion2gan.compare.compare import compare
from diffusion2gan.distill.train import distill
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.export import export
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import SPEC_FILE, open_set
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.recipe import load_recipe
from diffusion2gan.runtime.files import atomic_write, write_json
from diffusion2gan.runtime.progress import console
from diffusion2gan.teacher.loading import load_teacher

# Captions and noise of the report: used neither for training nor for evaluation
REPORT_WORLD = 2000
REPORT_SEED = 255


def demo(out: Path, *, count: int, num_prompts: int, settings: list[str]) -> dict[str, Any]:
    """Makes pairs, distills, exports, evaluates on `count` captions and writes a report.

    `settings` (`key=value`) override the recipe `pocket-demo`. Returns the contents of
    `out/metrics.json`. An interrupted demo continues when it is called again.
    """
    # 1. Pairs: the shipped set, completed by the teacher
    print_stage(1, "pairs: complete the shipped set with the 50-step teacher")
    pairs = out / "pairs"
    complete_shipped_pairs(pairs)

    # 2. Student
    print_stage(2, "distill: train a one-step student, initialised from the teacher")
    distill(load_recipe("pocket-demo", settings), pairs, out / "run")

    # 3. Pipeline folder
    print_stage(3, "export: write the student as a diffusers pipeline")
    export(out / "run", out / "export")

    # 4. Metrics of the new student, the shipped student and the teacher
    print_stage(4, f"evaluate: {count} held-out captions per system")
    # By name in the report: path, and num_inference_steps (None: the system's default)
    systems: dict[str, tuple[str, int | None]] = {
        "teacher": ("pocket-teacher", None),
        "student_demo": (str(out / "export"), None),
        "student": ("pocket-student", None),
        "teacher_one_step": ("pocket-teacher", 1),
    }
    metrics: dict[str, Any] = {}
    for name, (path, num_inference_steps) in systems.items():
        evaluation = EvaluateSettings(
            system=path,
            cache=out / "pictures",
            num_inference_steps=num_inference_steps,
            count=count,
        )
        metrics[name] = evaluate(evaluation)
    result = {"systems": metrics}
    write_json(out / "metrics.json", result)

    # 5. Report
    print_stage(5, "compare: write the report")
    loaded = {name: load_system(path, steps) for name, (path, steps) in systems.items()}
    prompts = scenes.captions(range(num_prompts), REPORT_WORLD)
    compare(loaded, prompts, out, seed=REPORT_SEED, metrics=metrics)
    console.print(
        f"Done. Open {out / 'index.html'} in a browser; the metrics are in {out / 'metrics.json'}.",
        soft_wrap=True,
    )
    return result


def complete_shipped_pairs(folder: Path) -> None:
    """Copies the shipped shards into `folder` (once), and makes the pairs that are missing."""
    if not (folder / SPEC_FILE).exists():
        with atomic_write(folder) as temporary:
            shutil.copytree(assets.folder("pairs"), temporary)

    spec = open_set(folder)
    make_pairs(load_teacher(device="auto"), scenes.pairs_captions(spec.seed), spec, folder)


def print_stage(number: int, text: str) -> None:
    console.rule(f"{number}/5 {text}", align="left")
