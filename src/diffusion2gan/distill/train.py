"""`diffusion2gan distill`: pairs → a one-step student. Run it again to resume exactly."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion2gan.adversarial.heads import set_spectral_norm_update
from diffusion2gan.adversarial.losses import (
    discriminator_loss,
    mix_and_match,
    plain_attention,
    r1_penalty,
    student_loss,
)
from diffusion2gan.distill.checkpoints import CHECKPOINT
from diffusion2gan.distill.checks import check_discriminator, check_pairs, check_ranks
from diffusion2gan.distill.health import (
    MAX_SKIPPED_IN_A_ROW,
    accuracy,
    latent_statistics,
    logit_means,
)
from diffusion2gan.distill.losses import Distance, build_distance
from diffusion2gan.distill.run import Run, load_recipe_teacher, open_run
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec, read_shard
from diffusion2gan.perceptual.augment import BatchRows
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import fsdp
from diffusion2gan.runtime.distributed import Flags, connect_ranks, get_ranks, resolve_device
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import contact_sheet
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.progress import Bar, console
from diffusion2gan.runtime.schedule import cosine_decay
from diffusion2gan.runtime.stop import StepControl, stop_signal
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.prompt_cache import PromptCache

STUDENT, DISCRIMINATOR = 0, 1  # which stream of a step's random numbers is whose
NUM_SAMPLES = 16


def distill(recipe: Recipe, pairs: Location, out: Path, allow_change: Sequence[str] = ()) -> None:
    """Trains until `recipe.total_pairs`; writes checkpoint, log.jsonl and sample sheets into `out`.

    Under torchrun all ranks train one run, the first writes. SIGTERM saves and ends the process with code 0 (torchrun
    itself, where it gets the signal, with 1).
    """
    device, here = resolve_device(recipe.device), get_ranks()
    check_ranks(recipe, here.world_size)
    teacher = load_recipe_teacher(recipe, device)
    reader = PairReader(pairs, recipe.seed)
    check_pairs(reader.spec, teacher, pairs)
    check_discriminator(recipe, teacher, reader, pairs)
    distance = build_distance(recipe, teacher.device, teacher)
    with (
        exclusive_lock(out / CHECKPOINT) if here.is_main else nullcontext(),
        connect_ranks(device) as group,
    ):
        run = Run(recipe, teacher, group)
        open_run(run, out, reader.spec, allow_change)
        free_memory(run, pairs, reader.spec)
        try:
            train(run, reader, distance, out)
        finally:
            run.saved()


def train(run: Run, reader: PairReader, distance: Distance, out: Path) -> None:
    """The loop."""
    recipe, main = run.recipe, run.group.ranks.is_main
    batches = reader.batches(recipe.batch_size, run.pairs_seen)
    with (
        stop_signal() as stopped,
        Bar(f"distill {recipe.loss}", recipe.total_pairs, run.pairs_seen) as bar,
    ):
        control = StepControl(stopped, main, recipe.checkpoint_every_s)
        while run.pairs_seen < recipe.total_pairs:
            before = run.pairs_seen
            entry, flags = step(run, next(batches), distance, control.request)
            report(run, entry, out)
            bar.advance(recipe.batch_size, run.health.line())
            if before // recipe.sample_every != run.pairs_seen // recipe.sample_every:
                write_samples(run, out, reader)
            if flags.stop or (flags.save and run.health.skipped_in_a_row == 0):
                run.save(out)
                control.checkpoint_written()
            if flags.stop:
                run.saved()
                exit_after_signal(stopped())
        run.save(out)
        run.saved()
    write_samples(run, out, reader)


def free_memory(run: Run, folder: Location, spec: PairsSpec) -> None:
    """Takes from the device what training does not read: the teacher's network and VAE, its text encoders."""
    recipe, teacher = run.recipe, run.teacher
    if recipe.prompt_embeds == "kept":
        if not isinstance(folder, Path):
            raise UserError(
                f"prompt_embeds=kept keeps them beside the pairs, and {folder} is no folder; set encoded"
            )
        prompts = [p for shard in range(spec.num_shards) for p in read_shard(folder, shard).prompts]
        teacher.cache_prompts(
            PromptCache(folder / f"prompts-{teacher.revision}", prompts, teacher.encode)
        )
    teacher.offload(network=not recipe.needs_teacher, vae=recipe.loss != "pixel_lpips")


def exit_after_signal(number: int | None) -> NoReturn:
    """Ends a run that was saved: at Ctrl-C as an interruption, at SIGTERM, also another rank's, as done."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    console.print("stopped and saved; the same command continues")
    raise SystemExit(0)


def step(
    run: Run, pairs: Pairs, distance: Distance, requested: Callable[[], Flags] = Flags
) -> tuple[dict[str, Any], Flags]:
    """Both players move on the same pairs, the discriminator first; returns what is logged.

    All randomness is a function of (seed, pairs seen), so a resumed run repeats it.
    """
    parts = micro_batches(run, pairs)
    playing = run.discriminator is not None and run.pairs_seen >= run.recipe.gan_start_pairs
    entry = discriminator_step(run, parts) if playing else {}
    student_entry, flags = student_step(run, parts, distance, requested)
    run.pairs_seen += len(pairs)
    return {"pairs_seen": run.pairs_seen} | entry | student_entry, flags


def discriminator_step(run: Run, parts: list[MicroBatch]) -> dict[str, Any]:
    """One update of D on real latents and fakes, some of them mismatched; every `r1_every` steps with the penalty."""
    recipe, discriminator, optimizer = run.recipe, run.discriminator, run.discriminator_optimizer
    assert discriminator is not None and optimizer is not None
    run.group.unshard(run.student.trained, discriminator)
    generator = torch.Generator("cpu").manual_seed(
        step_seed(recipe.seed, run.pairs_seen, DISCRIMINATOR)
    )
    fake, mixed = fakes(run, parts, generator)
    discriminator.requires_grad_(True)
    optimizer.zero_grad(set_to_none=True)
    total, real_logits, fake_logits = torch.zeros(()), [], []
    for part in parts:
        set_spectral_norm_update(discriminator, part is parts[0])
        both, noise = (
            torch.cat([part.latents, fake[part.rows]]),
            torch.cat([part.noise, part.noise]),
        )
        with run.autocast():
            logits = discriminator(noise, Conditioning.concat(part.cond, part.cond), both)
        on_real, on_fake = zip(*(x.chunk(2) for x in logits), strict=True)
        loss = discriminator_loss(on_real, on_fake) * part.weight
        loss.backward()
        total += loss.detach().cpu()
        real_logits.append(on_real)
        fake_logits.append(on_fake)
    set_spectral_norm_update(discriminator, False)
    r1 = (
        penalise(run, parts, generator)
        if (due := r1_is_due(recipe, run.pairs_seen))
        else torch.zeros(())
    )
    heads = scatter_rows(parts, real_logits) + scatter_rows(parts, fake_logits)
    (total, r1, *heads), _ = run.group.sum(discriminator, [total, r1, *heads])
    rate = (
        learning_rate(recipe, run.pairs_seen)
        * recipe.discriminator_learning_rate
        / recipe.learning_rate
    )
    grad_norm = update(optimizer, discriminator.parameters(), rate, recipe.max_grad_norm)
    told = discriminator_metrics(heads[: len(heads) // 2], heads[len(heads) // 2 :], mixed)
    return (
        {"d_loss": float(total), "d_grad_norm": grad_norm}
        | ({"r1": float(r1)} if due else {})
        | told
    )


@torch.no_grad()
def fakes(run: Run, parts: list[MicroBatch], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The student's latents [B, C, h, w], a share of the batch mismatched, and which, [B] bool.

    What is mismatched is drawn for the whole batch; rows of other ranks, which nobody looks at here, are zero.
    """
    with run.autocast():
        (fake,) = scatter_rows(parts, [(run.student(part.noise, part.cond),) for part in parts])
    batch = parts[0].batch
    return mix_and_match(
        fake, batch.latents.to(fake.device), batch.prompts, run.recipe.mix_share, generator
    )


def penalise(run: Run, parts: list[MicroBatch], generator: torch.Generator) -> Tensor:
    """Adds the gradient of γ/2·‖∇_x ΣD‖² on one real sample of the batch, times the interval, to D's.

    Returns ‖∇_x ΣD‖² on the rank that has the sample, zero on the others.
    """
    assert run.discriminator is not None
    row = int(torch.randint(len(parts[0].batch), (), generator=generator))
    for part in parts:
        if part.rows.start <= row < part.rows.stop:
            one = slice(row - part.rows.start, row - part.rows.start + 1)
            with plain_attention():
                penalty = r1_penalty(
                    run.discriminator, part.noise[one], part.cond.rows(one), part.latents[one]
                )
                (run.recipe.r1_weight / 2 * run.recipe.r1_every * penalty).backward()
            return penalty.detach().cpu()
    return torch.zeros(())


def student_step(
    run: Run, parts: list[MicroBatch], distance: Distance, requested: Callable[[], Flags] = Flags
) -> tuple[dict[str, Any], Flags]:
    """One update of the student and its average by distance + λ·softplus(−D), D held still."""
    recipe = run.recipe
    rate = learning_rate(recipe, run.pairs_seen)
    felt_from = recipe.gan_start_pairs + recipe.discriminator_warmup
    weight = recipe.adversarial_weight if run.pairs_seen >= felt_from else 0.0
    run.group.unshard(run.student.trained, run.discriminator if weight > 0 else None)
    run.optimizer.zero_grad(set_to_none=True)
    total, gan, answers = torch.zeros(()), torch.zeros(()), []
    for part in parts:
        generator = torch.Generator("cpu").manual_seed(step_seed(recipe.seed, run.pairs_seen))
        with run.autocast():
            latents = run.student(part.noise, part.cond)
        loss = regression = (
            distance(latents, part.latents, generator, part.batch_rows).mean() * part.weight
        )
        if run.discriminator is not None and weight > 0:
            with run.autocast():
                logits = run.discriminator.requires_grad_(False)(part.noise, part.cond, latents)
            adversarial = student_loss(logits) * part.weight
            loss = regression + weight * adversarial
            gan += adversarial.detach().cpu()
        loss.backward()
        total += regression.detach().cpu()
        answers.append((latents,))
    extras = [total, gan, *scatter_rows(parts, answers)]
    (total, gan, answer), flags = run.group.sum(run.student.trained, extras, requested())
    grad_norm = update(run.optimizer, run.student.trained.parameters(), rate, recipe.max_grad_norm)
    if math.isfinite(grad_norm):
        run.ema.update(run.student.trained)
    entry = {"loss": float(total), "grad_norm": grad_norm}
    entry |= {"gan_loss": float(gan)} if weight > 0 and run.discriminator else {}
    return entry | latent_statistics(answer, parts[0].batch.latents.to(answer.device)), flags


@dataclass(frozen=True)
class MicroBatch:
    """Some `rows` of a batch, on the device: what one forward pass sees. `weight` is its share of the whole batch."""

    rows: slice
    batch: Pairs
    noise: Tensor
    cond: Conditioning
    latents: Tensor

    @property
    def prompts(self) -> list[str]:
        return self.batch.prompts[self.rows]

    @property
    def weight(self) -> float:
        return len(self.prompts) / len(self.batch)

    @property
    def batch_rows(self) -> BatchRows:
        return BatchRows(self.rows, len(self.batch))


def micro_batches(run: Run, pairs: Pairs) -> list[MicroBatch]:
    """This rank's rows of the batch, cut into `gradient_accumulation_steps` parts."""
    here, gradient_accumulation_steps = run.group.ranks, run.recipe.gradient_accumulation_steps
    size = len(pairs) // (gradient_accumulation_steps * here.world_size)
    mine = range(
        here.rank * gradient_accumulation_steps, (here.rank + 1) * gradient_accumulation_steps
    )
    return [part_of(run, pairs, slice(place * size, (place + 1) * size)) for place in mine]


def part_of(run: Run, pairs: Pairs, rows: slice) -> MicroBatch:
    teacher = run.teacher
    noise = noise_from_seeds(pairs.seed[rows], teacher.latent_shape).to(teacher.device)
    latents = pairs.latents[rows].to(teacher.device)
    return MicroBatch(rows, pairs, noise, teacher.encode(pairs.prompts[rows]), latents)


def scatter_rows(parts: list[MicroBatch], values: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """What each part answered, kind by kind → [B, …] without graph, zero in the rows of other ranks."""
    whole = []
    for kind in zip(*values, strict=True):
        rows = torch.zeros(len(parts[0].batch), *kind[0].shape[1:], device=kind[0].device)
        for part, value in zip(parts, kind, strict=True):
            rows[part.rows] = value.detach().float()
        whole.append(rows)
    return whole


def update(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], rate: float, max_grad_norm: float
) -> float:
    """Clips and steps; a gradient that is not finite changes nothing. Returns the norm before clipping."""
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    grad_norm = float(fsdp.full_tensor(nn.utils.clip_grad_norm_(parameters, max_grad_norm)))
    if math.isfinite(grad_norm):
        optimizer.step()
    return grad_norm


def discriminator_metrics(real: list[Tensor], fake: list[Tensor], mixed: Tensor) -> dict[str, Any]:
    """What D answered to real and fake latents, and to those of the fakes that are `mixed` [B] bool."""
    on_real, on_fakes = accuracy(real, True), accuracy(fake, False)
    assert on_real is not None and on_fakes is not None
    return {
        "accuracy": (on_real + on_fakes) / 2,
        "accuracy_real": on_real,
        "accuracy_fake": accuracy(fake, False, ~mixed),
        "accuracy_mixed": accuracy(fake, False, mixed),
        "logits_real": logit_means(real),
        "logits_fake": logit_means(fake),
    }


def r1_is_due(recipe: Recipe, pairs_seen: int) -> bool:
    return recipe.r1_weight > 0 and pairs_seen // recipe.batch_size % recipe.r1_every == 0


def step_seed(seed: int, pairs_seen: int, player: int = STUDENT) -> int:
    """32 bits, all that torch's CPU generator takes, mixed from all, and not the seed of any pair's noise."""
    return int(np.random.SeedSequence([seed, pairs_seen]).generate_state(player + 1)[player])


def learning_rate(recipe: Recipe, pairs_seen: int) -> float:
    """Linear warm-up over the first `warmup` share, then a cosine to a twentieth."""
    progress = pairs_seen / recipe.total_pairs
    if progress < recipe.warmup:
        return (
            recipe.learning_rate
            * (pairs_seen + recipe.batch_size)
            / (recipe.warmup * recipe.total_pairs)
        )
    return cosine_decay(progress, recipe.learning_rate, recipe.warmup, floor=0.05)


def report(run: Run, entry: dict[str, Any], out: Path) -> None:
    """Logs a step, says new warnings, and raises Failure at the tenth step in a row that was skipped."""
    norms = [entry[key] for key in ("grad_norm", "d_grad_norm") if key in entry]
    warnings = run.health.record(entry, skipped=not all(map(math.isfinite, norms)))
    entry = entry | {"skipped": run.health.skipped, "skipped_share": run.health.average["skipped"]}
    entry |= {"warnings": warnings} if warnings else {}
    if run.group.ranks.is_main:
        with (out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: finite(value) for key, value in entry.items()}) + "\n")
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    if run.health.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        whose = {"grad_norm": "the student's", "d_grad_norm": "the discriminator's"}
        broken = " and ".join(
            who for key, who in whose.items() if not math.isfinite(entry.get(key, 0.0))
        )
        remedy = (
            "learning_rate" if "student" in broken else "discriminator_learning_rate or r1_weight"
        )
        kept = (
            "The last checkpoint is intact"
            if (out / CHECKPOINT).exists()
            else "No checkpoint was written yet"
        )
        raise Failure(
            f"{broken} gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to {run.pairs_seen} pairs "
            f"(loss {entry['loss']}). {kept}; lower {remedy} in a new run."
        )


def finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def write_samples(run: Run, out: Path, reader: PairReader) -> None:
    """A sheet of the averaged student above the teacher, same noises: out/samples/PAIRS_SEEN.png."""
    if not (run.group.ranks.is_main or run.cut):
        return
    pairs = reader.first(NUM_SAMPLES)
    noise = noise_from_seeds(pairs.seed, run.teacher.latent_shape).to(run.teacher.device)
    cond = run.teacher.encode(pairs.prompts)
    latents = run.with_ema(lambda: run.student(noise, cond))
    if not run.group.ranks.is_main:
        return
    ours = run.teacher.decode(latents)
    theirs = run.teacher.decode(pairs.latents.to(run.teacher.device))
    picture: Image.Image = contact_sheet(torch.cat([ours, theirs]), columns=len(pairs.prompts) // 2)
    write_image(out / "samples" / f"{run.pairs_seen:09d}.png", picture.save)
