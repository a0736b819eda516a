"""`diffusion2gan distill`: pairs → a one-step student. Run it again to resume exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion2gan.adversarial.losses import (
    discriminator_loss,
    mix_and_match,
    plain_attention,
    r1_penalty,
    student_loss,
)
from diffusion2gan.distill.health import MAX_SKIPPED_IN_A_ROW, accuracy, latent_statistics, logit_means
from diffusion2gan.distill.losses import Distance, distance_of
from diffusion2gan.distill.run import Run, open_run
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec, noise_of
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import sheet
from diffusion2gan.runtime.progress import Bar, console
from diffusion2gan.runtime.stop import stop_signal
from diffusion2gan.teacher.pipeline import Conditioning, Teacher, load_teacher

STUDENT, DISCRIMINATOR = 0, 1  # which stream of a step's random numbers is whose
NUM_SAMPLES = 16


def distill(recipe: Recipe, pairs: Path, out: Path) -> None:
    """Trains until `recipe.pairs_seen`; writes checkpoint, log.jsonl and sample sheets into `out`."""
    teacher = load_teacher(recipe.teacher, device_of(recipe))
    reader = PairReader(pairs, recipe.seed)
    check_pairs(reader.spec, teacher, pairs)
    check_prompts(recipe, reader, pairs)
    distance = distance_of(recipe, teacher.device, teacher.vae)
    run = Run(recipe, teacher)
    open_run(run, out, reader.spec)
    batches = reader.batches(recipe.batch_size, run.pairs_seen)
    saved = time.monotonic()
    with stop_signal() as stopped, Bar(f"distill {recipe.loss}", recipe.pairs_seen, run.pairs_seen) as bar:
        while run.pairs_seen < recipe.pairs_seen:
            before = run.pairs_seen
            entry = step(run, next(batches), distance)
            report(run, entry, out)
            bar.advance(recipe.batch_size, run.health.line())
            if before // recipe.sample_every != run.pairs_seen // recipe.sample_every:
                write_samples(run, out, reader)
            if time.monotonic() - saved > recipe.checkpoint_every_s and run.health.skipped_in_a_row == 0:
                run.save(out)
                saved = time.monotonic()
            if stopped():
                run.save(out)
                raise KeyboardInterrupt
    run.save(out)
    write_samples(run, out, reader)


def step(run: Run, pairs: Pairs, distance: Distance) -> dict[str, Any]:
    """Both players move on the same pairs, the discriminator first; returns what is logged.

    All randomness is a function of (seed, pairs seen), so a resumed run repeats it.
    """
    parts = parts_of(run, pairs)
    entry = {} if run.discriminator is None else discriminator_step(run, parts)
    entry |= student_step(run, parts, distance)
    run.pairs_seen += len(pairs)
    return {"pairs_seen": run.pairs_seen} | entry


def discriminator_step(run: Run, parts: list[Part]) -> dict[str, Any]:
    """One update of D on real latents and fakes, some of them mismatched; every `r1_every` steps with the penalty."""
    recipe, discriminator, optimizer = run.recipe, run.discriminator, run.discriminator_optimizer
    assert discriminator is not None and optimizer is not None
    generator = torch.Generator("cpu").manual_seed(step_seed(recipe.seed, run.pairs_seen, DISCRIMINATOR))
    fake, mixed = fakes(run, parts, generator)
    discriminator.requires_grad_(True)
    optimizer.zero_grad(set_to_none=True)
    total, real_logits, fake_logits = 0.0, [], []
    for part in parts:
        both, noise = torch.cat([part.latents, fake[part.rows]]), torch.cat([part.noise, part.noise])
        with run.autocast():
            logits = discriminator(noise, Conditioning.concat(part.cond, part.cond), both)
        on_real, on_fake = zip(*(x.chunk(2) for x in logits), strict=True)
        loss = discriminator_loss(on_real, on_fake) * part.weight
        loss.backward()
        total += float(loss.detach())
        real_logits.append(on_real)
        fake_logits.append(on_fake)
    r1 = penalise(run, parts, generator) if r1_is_due(recipe, run.pairs_seen) else {}
    rate = learning_rate(recipe, run.pairs_seen) * recipe.discriminator_learning_rate / recipe.learning_rate
    grad_norm = update(optimizer, discriminator.parameters(), rate, recipe.max_grad_norm)
    told = told_apart(together(real_logits), together(fake_logits), mixed)
    return {"d_loss": total, "d_grad_norm": grad_norm} | r1 | told


@torch.no_grad()
def fakes(run: Run, parts: list[Part], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The student's latents of the whole batch [B, C, h, w], a share of them mismatched, and which, [B] bool."""
    with run.autocast():
        fake = torch.cat([run.student(part.noise, part.cond) for part in parts])
    real, prompts = torch.cat([part.latents for part in parts]), [p for part in parts for p in part.prompts]
    return mix_and_match(fake, real, prompts, run.recipe.mix_share, generator)


def penalise(run: Run, parts: list[Part], generator: torch.Generator) -> dict[str, float]:
    """Adds the gradient of γ/2·‖∇_x ΣD‖² on one real sample, times the interval, to D's."""
    assert run.discriminator is not None
    row = int(torch.randint(parts[0].batch_size, (), generator=generator))
    place, row = divmod(row, len(parts[0].prompts))
    part, one = parts[place], slice(row, row + 1)
    with plain_attention():
        penalty = r1_penalty(run.discriminator, part.noise[one], part.cond.rows(one), part.latents[one])
        (run.recipe.r1_weight / 2 * run.recipe.r1_every * penalty).backward()
    return {"r1": float(penalty.detach())}


def student_step(run: Run, parts: list[Part], distance: Distance) -> dict[str, Any]:
    """One update of the student and its average by distance + λ·softplus(−D), D held still."""
    recipe = run.recipe
    weight = recipe.adversarial_weight if run.pairs_seen >= recipe.discriminator_warmup else 0.0
    run.optimizer.zero_grad(set_to_none=True)
    total, gan, answers = 0.0, 0.0, []
    for part in parts:
        generator = torch.Generator("cpu").manual_seed(step_seed(recipe.seed, run.pairs_seen))
        with run.autocast():
            latents = run.student(part.noise, part.cond)
        loss = regression = distance(latents, part.latents, generator, part.place).mean() * part.weight
        if run.discriminator is not None and weight > 0:
            with run.autocast():
                logits = run.discriminator.requires_grad_(False)(part.noise, part.cond, latents)
            adversarial = student_loss(logits) * part.weight
            loss = regression + weight * adversarial
            gan += float(adversarial.detach())
        loss.backward()
        total += float(regression.detach())
        answers.append(latents.detach())
    rate = learning_rate(recipe, run.pairs_seen)
    grad_norm = update(run.optimizer, run.student.parameters(), rate, recipe.max_grad_norm)
    if math.isfinite(grad_norm):
        run.ema.update(run.student.unet)
    entry = {"loss": total, "grad_norm": grad_norm} | ({"gan_loss": gan} if weight > 0 and run.discriminator else {})
    return entry | latent_statistics(torch.cat(answers), torch.cat([part.latents for part in parts]))


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, on the device: what one forward pass sees. `weight` is its share of the batch."""

    rows: slice
    batch_size: int
    noise: Tensor
    cond: Conditioning
    latents: Tensor
    prompts: list[str]

    @property
    def weight(self) -> float:
        return len(self.prompts) / self.batch_size

    @property
    def place(self) -> tuple[slice, int]:
        return self.rows, self.batch_size


def parts_of(run: Run, pairs: Pairs) -> list[Part]:
    """The batch, cut into `accumulate` parts."""
    teacher, size = run.teacher, len(pairs) // run.recipe.accumulate
    noise, latents = (x.to(teacher.device) for x in (noise_of(pairs.seed, teacher.latent_shape), pairs.latents))
    every = [slice(start, start + size) for start in range(0, len(pairs), size)]
    return [
        Part(rows, len(pairs), noise[rows], teacher.encode(pairs.prompts[rows]), latents[rows], pairs.prompts[rows])
        for rows in every
    ]


def update(optimizer: Optimizer, parameters: Iterable[nn.Parameter], rate: float, max_grad_norm: float) -> float:
    """Clips and steps; a gradient that is not finite changes nothing. Returns the norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    grad_norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if math.isfinite(grad_norm):
        optimizer.step()
    return grad_norm


def together(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Each part's logits → the whole batch's, head by head, without graph."""
    return [torch.cat(head).detach() for head in zip(*parts, strict=True)]


def told_apart(real: list[Tensor], fake: list[Tensor], mixed: Tensor) -> dict[str, Any]:
    """What D answered to real and fake latents, and to those of the fakes that are `mixed` [B] bool."""
    return {
        "accuracy_real": accuracy(real, True), "accuracy_fake": accuracy(fake, False, ~mixed),
        "accuracy_mixed": accuracy(fake, False, mixed), "logits_real": logit_means(real),
        "logits_fake": logit_means(fake),
    }  # fmt: skip


def r1_is_due(recipe: Recipe, pairs_seen: int) -> bool:
    return recipe.r1_weight > 0 and pairs_seen // recipe.batch_size % recipe.r1_every == 0


def step_seed(seed: int, pairs_seen: int, player: int = STUDENT) -> int:
    """32 bits, all that torch's CPU generator takes, mixed from all, and not the seed of any pair's noise."""
    return int(np.random.SeedSequence([seed, pairs_seen]).generate_state(player + 1)[player])


def learning_rate(recipe: Recipe, pairs_seen: int) -> float:
    """Linear warm-up over the first `warmup` share, then a cosine to a twentieth."""
    progress = pairs_seen / recipe.pairs_seen
    if progress < recipe.warmup:
        return recipe.learning_rate * (pairs_seen + recipe.batch_size) / (recipe.warmup * recipe.pairs_seen)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)))
    return recipe.learning_rate * (0.05 + 0.95 * cosine)


def device_of(recipe: Recipe) -> torch.device:
    """Raises UserError where the recipe's device is unknown or not here."""
    try:
        return torch.empty(0, device=recipe.device).device
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise UserError(f"device = {recipe.device!r} is not here ({told}); set device=cpu or one that is") from error


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


def check_prompts(recipe: Recipe, reader: PairReader, folder: Path) -> None:
    """Raises UserError where a discriminator shall read prompts and the first pairs have none."""
    if recipe.adversarial_weight > 0 and not any(reader.first(NUM_SAMPLES).prompts):
        raise UserError(
            f"the pairs in {folder} have no prompts, and the discriminator is to read them. Make pairs with prompts, "
            "or set adversarial_weight=0."
        )


def report(run: Run, entry: dict[str, Any], out: Path) -> None:
    """Logs a step, says new warnings, and raises Failure at the tenth step in a row that was skipped."""
    norms = [entry[key] for key in ("grad_norm", "d_grad_norm") if key in entry]
    warnings = run.health.record(entry, skipped=not all(map(math.isfinite, norms)))
    entry = entry | {"skipped": run.health.skipped} | ({"warnings": warnings} if warnings else {})
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({key: finite(value) for key, value in entry.items()}) + "\n")
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    if run.health.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise Failure(
            f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to {run.pairs_seen} pairs (loss "
            f"{entry['loss']}). The last checkpoint is intact; lower learning_rate in a new run."
        )


def finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def write_samples(run: Run, out: Path, reader: PairReader) -> None:
    """A sheet of the averaged student above the teacher, same noises: out/samples/PAIRS_SEEN.png."""
    pairs = reader.first(NUM_SAMPLES)
    noise = noise_of(pairs.seed, run.teacher.latent_shape).to(run.teacher.device)
    cond = run.teacher.encode(pairs.prompts)
    ours = run.teacher.decode(run.with_ema(lambda: run.student(noise, cond)))
    theirs = run.teacher.decode(pairs.latents.to(run.teacher.device))
    picture: Image.Image = sheet(torch.cat([ours, theirs]), columns=len(pairs.prompts) // 2)
    write_image(out / "samples" / f"{run.pairs_seen:09d}.png", picture.save)


def dry_run(recipe: Recipe, pairs: Path) -> dict[str, float | int | str]:
    """What the run would cost: parameters, steps, memory by part (MiB, float32), measured seconds a step."""
    teacher = load_teacher(recipe.teacher, device_of(recipe))
    reader = PairReader(pairs, recipe.seed)
    check_pairs(reader.spec, teacher, pairs)
    check_prompts(recipe, reader, pairs)
    run, distance = Run(recipe, teacher), distance_of(recipe, teacher.device, teacher.vae)
    batches = reader.batches(recipe.batch_size)
    step(run, next(batches), distance)
    start = time.monotonic()
    step(run, next(batches), distance)
    step_s = time.monotonic() - start
    student = sum(p.numel() for p in run.student.parameters())
    discriminator = 0 if run.discriminator is None else sum(p.numel() for p in run.discriminator.parameters())
    steps = -(-recipe.pairs_seen // recipe.batch_size)
    return {
        "student_parameters": student, "discriminator_parameters": discriminator,
        "weights_gradients_adam_ema_mib": round((student * 5 + discriminator * 4) * 4 / 2**20, 1),
        "steps": steps, "seconds_per_step": round(step_s, 3), "hours": round(steps * step_s / 3600, 2),
    }  # fmt: skip
