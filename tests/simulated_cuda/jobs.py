"""Jobs on the simulated device, one per process: `python jobs.py JOB`.

Prints a line of JSON: the waits of the host, by kind and line, and what else the job measures. An
operation on tensors of different devices raises an error.
"""

# ruff: noqa: E402 (torch is imported after the library is loaded)
from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device  # before torch

sys.path.append(str(Path(__file__).parents[1]))

CALLS = device.install()

import tiny_families
import torch
from PIL import Image

from diffusion2gan.cost import pairs as pairs_cost
from diffusion2gan.distill import train
from diffusion2gan.distill.batches import prepare
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.evaluate.run import evaluate
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.generate import generate
from diffusion2gan.pairs.make import PairsSettings, build_spec, make_pairs
from diffusion2gan.pairs.store import Pairs, read_shard
from diffusion2gan.perceptual.fit import FitSettings, fit
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import train as pocket_train
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.ema import EMA
from diffusion2gan.runtime.stop import stop_signal
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


def take_two_steps(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Two steps; the waits are those of the second. Then a checkpoint, loaded by another run."""
    recipe = Recipe.model_validate({"batch_size": len(PROMPTS), "device": name, **settings})
    teacher = load_teacher(recipe.teacher, name)
    run = Run(recipe, teacher)
    distance = build_distance(recipe, teacher.device, teacher)
    seeds = list(range(len(PROMPTS)))
    latents = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(seeds, seeds, PROMPTS, latents.cpu())

    # The numbers of a step are read during the next one, as in `distill`
    metrics, _ = step(run, prepare(run, pairs), distance)
    device.waits.clear()
    operations_before = device.totals["operations"]
    step(run, prepare(run, pairs), distance)
    entry = metrics.read()
    waits = dict(device.waits)
    num_operations = device.totals["operations"] - operations_before

    with tempfile.TemporaryDirectory() as folder:
        run.save(Path(folder))
        run.wait_until_saved()
        Run(recipe, teacher).load(Path(folder))
    return {
        "waits": named(waits),
        "num_operations": num_operations,
        "loss": entry["loss"],
        "device": str(teacher.device),
    }


def scale_gradients(run: Run, factor: float) -> Any:
    """Multiplies the gradients of the student's outputs, until `remove` of the returned handle."""

    def add_hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)

    return run.student.register_forward_hook(add_hook)


def run_distill(name: str) -> dict[str, Any]:
    """`distill` with kept prompts: its log, and the waits from the third step to the fourth.

    The gradient of the second step is NaN. It is stopped after the fifth step and resumed.
    """
    teacher = load_teacher("pocket", name)
    settings = {**ADVERSARIAL, "batch_size": 2, "total_pairs": 12, "prompt_embeds": "kept"}
    recipe = Recipe.model_validate({**settings, "device": name, "sample_every": 10**6})
    waits_at_step: list[int] = []
    precisions: set[str] = {torch.get_float32_matmul_precision()}

    def take_step(run: Run, *args: Any) -> Any:
        waits_at_step.append(device.totals["waits"])
        precisions.add(torch.get_float32_matmul_precision())
        factor = float("nan") if len(waits_at_step) == 2 else 1.0
        hook = scale_gradients(run, factor)
        try:
            return step(run, *args)
        finally:
            hook.remove()

    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        spec = build_spec(teacher, PROMPTS, PairsSettings(count=4, num_inference_steps=1))
        make_pairs(teacher, PROMPTS, spec, pairs)
        out = Path(folder) / "run"

        def stop_after_five_steps() -> Any:
            return nullcontext(lambda: 15 if len(waits_at_step) == 5 else None)

        train.step = take_step
        train.stop_signal = stop_after_five_steps
        with suppress(SystemExit):
            train.distill(recipe, pairs, out)
        num_steps_before = len(waits_at_step)
        train.stop_signal = stop_signal
        train.distill(recipe, pairs, out)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        header = checkpoint.meta(out / "checkpoint.safetensors")
    return {
        "num_waits": waits_at_step[3] - waits_at_step[2],
        "num_steps": [num_steps_before, len(waits_at_step)],
        "matmul_precisions": sorted(precisions),
        "num_updates": header["num_updates"],
        "losses": [line["loss"] for line in lines],
        "skipped": [line["skipped"] for line in lines],
    }


def diverge(name: str) -> dict[str, Any]:
    """`distill` whose gradients are not finite from the third step on; saved as often as can be."""
    teacher = load_teacher("pocket", name)
    settings = {**REGRESSION, "batch_size": 2, "total_pairs": 100, "checkpoint_every_s": 1e-9}
    recipe = Recipe.model_validate({**settings, "device": name, "sample_every": 10**6})
    num_steps = 0

    def take_step(run: Run, *args: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            scale_gradients(run, float("nan"))
        return step(run, *args)

    train.step = take_step
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        spec = build_spec(teacher, PROMPTS, PairsSettings(count=4, num_inference_steps=1))
        make_pairs(teacher, PROMPTS, spec, pairs)
        out = Path(folder) / "run"
        try:
            train.distill(recipe, pairs, out)
        except Failure as error:
            message = str(error)
        lines = (out / "log.jsonl").read_text().splitlines()
        tensors, header = checkpoint.load(out / "checkpoint.safetensors")
    return {
        "message": message,
        "num_lines": len(lines),
        "pairs_seen": header["pairs_seen"],
        "num_bad": len(checkpoint.find_non_finite(tensors)),
    }


def refuse_r1(name: str) -> dict[str, Any]:
    """`distill` with R1 on a GPU with less memory than that needs, by either method."""
    teacher = load_teacher("pocket", name)
    messages = []
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        spec = build_spec(teacher, PROMPTS, PairsSettings(count=4, num_inference_steps=1))
        make_pairs(teacher, PROMPTS, spec, pairs)
        for method, memory in (("exact", 200), ("finite_differences", 200), ("exact", 400)):
            properties = SimpleNamespace(total_memory=memory * 2**20)
            torch.cuda.get_device_properties = lambda device, found=properties: found
            settings = {**ADVERSARIAL, "batch_size": 2, "total_pairs": 2, "r1_method": method}
            recipe = Recipe.model_validate({**settings, "device": name})
            out = Path(folder) / f"{method}-{memory}"
            try:
                train.distill(recipe, pairs, out)
                messages.append("")
            except UserError as error:
                assert not (out / "recipe.json").exists()
                messages.append(str(error))
    return {"messages": messages}


def make(name: str) -> dict[str, Any]:
    """Two pairs in two steps."""
    teacher = load_teacher("pocket", name)
    settings = PairsSettings(count=2, num_inference_steps=2)
    spec = build_spec(teacher, PROMPTS, settings)
    with tempfile.TemporaryDirectory() as folder:
        make_pairs(teacher, PROMPTS, spec, Path(folder))
        latents = read_shard(Path(folder), 0).latents
    return {
        "latents": latents.flatten()[:64].tolist(),
        "device": str(teacher.device),
        "waits": named(device.waits),
    }


def count_fit_waits() -> list[tuple[EMA, str, list[int]]]:
    """A list that gets (average, class of what is trained, waits so far at every step) per fit."""
    update = EMA.update
    fits: list[tuple[EMA, str, list[int]]] = []

    def counted(self: EMA, module: torch.nn.Module, *args: Any) -> None:
        if not fits or fits[-1][0] is not self:
            fits.append((self, type(module).__name__, []))
        fits[-1][2].append(device.totals["waits"])
        update(self, module, *args)

    EMA.update = counted  # type: ignore[method-assign]
    return fits


def waits_per_step(fits: list[tuple[EMA, str, list[int]]]) -> list[tuple[str, list[int]]]:
    """Between the steps of each fit, but for the first and the last, which begin and save."""
    counts = []
    for _, name, numbers in fits:
        counts.append((name, [b - a for a, b in pairwise(numbers[1:-1])]))
    return counts


def fit_perceptual(name: str) -> dict[str, Any]:
    """`perceptual fit` on the pocket VAE's latents, of images in two colours."""
    fits = count_fit_waits()
    with tempfile.TemporaryDirectory() as folder:
        for colour in ("blue", "red"):
            (Path(folder) / "images" / colour).mkdir(parents=True)
            for number in range(10):
                image = Image.new("RGB", (16, 16), colour)
                image.putpixel((number, 0), (255, 255, 255))
                image.save(Path(folder) / "images" / colour / f"{number}.png")
        settings = FitSettings((4, 4, 8, 8, 8), size=16, epochs=3, batch_size=8)
        fit(Path(folder) / "images", Path(folder) / "out", "pocket", settings, name)
        tensors, _ = checkpoint.load(Path(folder) / "out" / "model.safetensors")
    return {
        "waits_per_step": waits_per_step(fits),
        "sum": float(sum(x.double().abs().sum() for x in tensors.values())),
    }


def train_pocket(name: str) -> dict[str, Any]:
    """`pocket train` with the fewest images."""
    fits = count_fit_waits()
    with tempfile.TemporaryDirectory() as folder:
        pocket_train.train(Path(folder), scale=1e-9, device=name)
    return {"waits_per_step": waits_per_step(fits)}


def measure_cost(name: str) -> dict[str, Any]:
    """The dry run of pairs: how often it waits for the device before it reads a clock."""
    teacher = load_teacher("pocket", name)
    spec = build_spec(teacher, PROMPTS, PairsSettings(count=2))

    def read_clock() -> float:
        CALLS.append("clock")
        return float(len(CALLS))

    CALLS.clear()
    clock = SimpleNamespace(monotonic=read_clock)
    setattr(pairs_cost, "time", clock)  # noqa: B010
    pairs_cost.estimate_pairs_cost(teacher, spec, PROMPTS)
    return {"calls": list(CALLS)}


def make_in_bfloat16(name: str) -> dict[str, Any]:
    """Two pairs with the network in bfloat16, and the VAE and the text encoders offloaded."""
    teacher = load_teacher("pocket", name)
    teacher.set_precision("bfloat16")
    settings = PairsSettings(count=2, num_inference_steps=2)
    spec = replace(build_spec(teacher, PROMPTS, settings), precision="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        make_pairs(teacher, PROMPTS, spec, Path(folder), offload=True)
        latents = read_shard(Path(folder), 0).latents
    return {
        "latents": latents.flatten()[:64].tolist(),
        "devices": {
            "network": str(next(teacher.network.parameters()).device),
            "vae": str(next(teacher.vae.parameters()).device),
            "text_encoder": str(teacher.pipeline.text_encoder.device),
        },
    }


def train_family(family: str, name: str) -> dict[str, Any]:
    """Two steps of a tiny pipeline of this family, with the discriminator and R1."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = tiny_families.save(family, Path(folder) / "teacher")
        settings = {**ADVERSARIAL, "teacher": str(teacher), "loss": "mse", "mix_share": 0.5}
        return take_two_steps(settings, name)


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
    if job.startswith("family-"):
        result = train_family(job.removeprefix("family-"), name)
    elif job in RECIPES:
        result = take_two_steps(RECIPES[job], name)
    else:
        jobs = {
            "pairs": make,
            "pairs_in_bfloat16": make_in_bfloat16,
            "fit": fit_perceptual,
            "pocket_train": train_pocket,
            "distill": run_distill,
            "diverge": diverge,
            "refuse_r1": refuse_r1,
            "cost": measure_cost,
            "evaluate": evaluate_systems,
            "mixed_devices": refuse_mixed_devices,
            "set_device": set_device,
        }
        result = jobs[job](name)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
