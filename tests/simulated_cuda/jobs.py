"""Jobs on the simulated device, one per process: `python jobs.py JOB`.

Prints a line of JSON: the waits of the host, by kind and line, and what else the job measures. An
operation on tensors of different devices raises an error.
"""

# ruff: noqa: E402 (torch is imported after the library is loaded)
from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import device  # before torch

CALLS = device.install()

import torch

from diffusion2gan.cost.pairs import estimate_pairs_cost
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.generate import generate
from diffusion2gan.pairs.make import PairsSettings, build_spec, make_pairs
from diffusion2gan.pairs.store import Pairs, read_shard
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.teacher.loading import load_teacher

PROMPTS = ["a blue star on sand", "two red rings on grass"]
REGRESSION: dict[str, Any] = {"loss": "e_latent_lpips", "adversarial_weight": 0.0}
ADVERSARIAL: dict[str, Any] = {
    **REGRESSION,
    "adversarial_weight": 0.5,
    "discriminator_warmup": 0,
    "r1_weight": 1e-7,
    "r1_every": 1,
    "mix_share": 0.5,
}
RECIPES: dict[str, dict[str, Any]] = {
    "regression": REGRESSION,
    "with_d_and_r1": ADVERSARIAL,
    "lora": {**REGRESSION, "lora_rank": 2},
    "pixel_lpips": {**REGRESSION, "loss": "pixel_lpips"},
    "teacher_features": {**REGRESSION, "perceptual": "teacher"},
    "micro_batches": {**ADVERSARIAL, "gradient_accumulation_steps": 2},
}


def train(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Two steps; the waits are those of the second. Then a checkpoint, loaded by another run."""
    teacher = load_teacher("pocket", name)
    recipe = Recipe.model_validate({"batch_size": len(PROMPTS), "device": name, **settings})
    run = Run(recipe, teacher)
    distance = build_distance(recipe, teacher.device, teacher)
    seeds = list(range(len(PROMPTS)))
    latents = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(seeds, seeds, PROMPTS, latents.cpu())

    entry, _ = step(run, pairs, distance)
    device.waits.clear()
    step(run, pairs, distance)
    waits = dict(device.waits)

    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder))
        run.wait_until_saved()
        Run(recipe, teacher).load(Path(folder))
    return {"waits": named(waits), "loss": entry["loss"], "device": str(teacher.device)}


def make(name: str) -> dict[str, Any]:
    """Two pairs in two steps."""
    teacher = load_teacher("pocket", name)
    settings = PairsSettings(count=2, num_inference_steps=2)
    spec = build_spec(teacher, PROMPTS, settings)
    with tempfile.TemporaryDirectory() as folder:
        make_pairs(teacher, PROMPTS, spec, Path(folder))
        latents = read_shard(Path(folder), 0).latents
    return {"latents": latents.flatten()[:64].tolist(), "device": str(teacher.device)}


def measure_cost(name: str) -> dict[str, Any]:
    """The dry run of pairs: how often it waits for the device before it reads a clock."""
    teacher = load_teacher("pocket", name)
    spec = build_spec(teacher, PROMPTS, PairsSettings(count=2))
    CALLS.clear()
    estimate_pairs_cost(teacher, spec, PROMPTS)
    return {"calls": list(CALLS)}


def evaluate_systems(name: str) -> dict[str, Any]:
    """A grid of images and the pocket protocol, by the shipped student."""
    with tempfile.TemporaryDirectory() as folder:
        student = load_system("pocket-student", device=name)
        generate(student, PROMPTS, 0, 1, Path(folder) / "grid.png")
        settings = EvaluateSettings(
            "pocket-student", Path(folder) / "cache", count=2, num_resamples=0, device=name
        )
        metrics = evaluate(settings)
    return {"clip_score": metrics["clip_score"], "device": metrics["device"]}


def refuse_mixed_devices(name: str) -> dict[str, Any]:
    """That the simulation notices: the sum of tensors on two devices, and a wait."""
    a = torch.zeros(2, device=name)
    try:
        a + torch.zeros(2, device="cpu")
    except RuntimeError as error:
        message = str(error)
    else:
        message = "no error"
    device.waits.clear()
    float((a + 1).sum())
    return {"message": message, "num_waits": device.waits.total()}


def set_device(name: str) -> dict[str, Any]:
    resolve_device(name)
    return {"calls": list(CALLS)}


def named(waits: dict[tuple[str, str], int]) -> dict[str, int]:
    return {f"{kind}, {line}": count for (kind, line), count in waits.items()}


def main() -> None:
    job, name = sys.argv[1:]
    if job in RECIPES:
        result = train(RECIPES[job], name)
    else:
        jobs = {
            "pairs": make,
            "cost": measure_cost,
            "evaluate": evaluate_systems,
            "mixed_devices": refuse_mixed_devices,
            "set_device": set_device,
        }
        result = jobs[job](name)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
