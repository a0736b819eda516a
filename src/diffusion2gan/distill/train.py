"""`diffusion2gan distill`: pairs → a one-step student. Run it again to resume exactly."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffusion2gan.distill.losses import Distance, distance_of
from diffusion2gan.distill.run import Run, open_run
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec, noise_of
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import sheet
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.stop import stop_signal
from diffusion2gan.teacher.pipeline import Teacher, load_teacher

NUM_SAMPLES = 16


def distill(recipe: Recipe, pairs: Path, out: Path) -> None:
    """Trains until `recipe.pairs_seen`; writes checkpoint, log.jsonl and sample sheets into `out`."""
    teacher = load_teacher(recipe.teacher)
    reader = PairReader(pairs, recipe.seed)
    check_pairs(reader.spec, teacher, pairs)
    distance = distance_of(recipe, teacher.device, teacher.vae)
    run = Run(recipe, teacher)
    open_run(run, out, reader.spec)
    batches = reader.batches(recipe.batch_size, run.pairs_seen)
    saved = time.monotonic()
    with stop_signal() as stopped, Bar(f"distill {recipe.loss}", recipe.pairs_seen, run.pairs_seen) as bar:
        while run.pairs_seen < recipe.pairs_seen:
            before = run.pairs_seen
            loss, grad_norm = student_step(run, next(batches), distance)
            bar.advance(recipe.batch_size, f"loss {loss:.4f}")
            _log(out, run, loss, grad_norm)
            if before // recipe.sample_every != run.pairs_seen // recipe.sample_every:
                write_samples(run, out, reader)
            if time.monotonic() - saved > recipe.checkpoint_every_s:
                run.save(out)
                saved = time.monotonic()
            if stopped():
                run.save(out)
                raise KeyboardInterrupt
    run.save(out)
    write_samples(run, out, reader)


def student_step(run: Run, pairs: Pairs, distance: Distance) -> tuple[float, float]:
    """One update of the student and its average; returns (loss, gradient norm).

    Its randomness is a function of (seed, pairs seen), so a resumed run repeats it. An adversarial term joins the
    loss here.
    """
    recipe, teacher = run.recipe, run.teacher
    generator = torch.Generator("cpu").manual_seed(step_seed(recipe.seed, run.pairs_seen))
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, run.pairs_seen)
    noise = noise_of(pairs.seed, teacher.latent_shape).to(teacher.device)
    latents = run.student(noise, teacher.encode(pairs.prompts))
    loss = distance(latents, pairs.latents.to(teacher.device), generator).mean()
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(run.student.parameters(), recipe.max_grad_norm)
    if not torch.isfinite(grad_norm):
        raise Failure(
            f"the gradient is not finite after {run.pairs_seen} pairs (loss {float(loss.detach())}). The last "
            "checkpoint is intact; lower learning_rate in a new run."
        )
    run.optimizer.step()
    run.ema.update(run.student.unet)
    run.pairs_seen += recipe.batch_size
    return float(loss.detach()), float(grad_norm)


def step_seed(seed: int, pairs_seen: int) -> int:
    """32 bits, all that torch's CPU generator takes, mixed from both, and not the seed of any pair's noise."""
    return int(np.random.SeedSequence([seed, pairs_seen]).generate_state(1)[0])


def learning_rate(recipe: Recipe, pairs_seen: int) -> float:
    """Linear warm-up over the first `warmup` share, then a cosine to a twentieth."""
    progress = pairs_seen / recipe.pairs_seen
    if progress < recipe.warmup:
        return recipe.learning_rate * (pairs_seen + recipe.batch_size) / (recipe.warmup * recipe.pairs_seen)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))
    return recipe.learning_rate * (0.05 + 0.95 * cosine)


def check_pairs(spec: PairsSpec, teacher: Teacher, folder: Path) -> None:
    """Raises UserError where the pairs are another teacher's or another resolution's."""
    if spec.revision != teacher.revision:
        raise UserError(
            f"the pairs in {folder} were made by teacher {spec.teacher!r} (weights {spec.revision}), the recipe's is "
            f"{teacher.name!r} (weights {teacher.revision}). Make pairs with this teacher, or set teacher=… to theirs."
        )
    if tuple(spec.latent_shape) != teacher.latent_shape:
        raise UserError(
            f"the pairs in {folder} have latents of {tuple(spec.latent_shape)}, the teacher's are "
            f"{teacher.latent_shape}; make pairs at this resolution."
        )


def _log(out: Path, run: Run, loss: float, grad_norm: float) -> None:
    entry = {"pairs_seen": run.pairs_seen, "loss": loss, "grad_norm": grad_norm}
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


@torch.no_grad()
def write_samples(run: Run, out: Path, reader: PairReader) -> None:
    """A sheet of the averaged student above the teacher, same noises: out/samples/PAIRS_SEEN.png."""
    pairs = next(PairReader.batches(reader, min(NUM_SAMPLES, reader.spec.count)))
    noise = noise_of(pairs.seed, run.teacher.latent_shape).to(run.teacher.device)
    cond = run.teacher.encode(pairs.prompts)
    ours = run.teacher.decode(run.with_ema(lambda: run.student(noise, cond)))
    theirs = run.teacher.decode(pairs.latents.to(run.teacher.device))
    picture: Image.Image = sheet(torch.cat([ours, theirs]), columns=len(pairs.prompts) // 2)
    write_image(out / "samples" / f"{run.pairs_seen:09d}.png", picture.save)


def dry_run(recipe: Recipe, pairs: Path) -> dict[str, float | int | str]:
    """What the run would cost: parameters, steps, memory by part (MiB, float32), measured seconds a step."""
    teacher = load_teacher(recipe.teacher)
    reader = PairReader(pairs, recipe.seed)
    check_pairs(reader.spec, teacher, pairs)
    run, distance = Run(recipe, teacher), distance_of(recipe, teacher.device, teacher.vae)
    batches = reader.batches(recipe.batch_size)
    student_step(run, next(batches), distance)
    start = time.monotonic()
    student_step(run, next(batches), distance)
    step_s = time.monotonic() - start
    parameters = sum(p.numel() for p in run.student.parameters())
    steps = -(-recipe.pairs_seen // recipe.batch_size)
    return {
        "student_parameters": parameters, "weights_gradients_adam_ema_mib": round(parameters * 4 * 5 / 2**20, 1),
        "steps": steps, "seconds_per_step": round(step_s, 3), "hours": round(steps * step_s / 3600, 2),
    }  # fmt: skip
