"""`diffusion2gan distill`: trains a one-step student on pairs. Running it again resumes exactly."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import NoReturn

import torch

from diffusion2gan.distill.automatic import resolve_recipe
from diffusion2gan.distill.batches import prefetch
from diffusion2gan.distill.checkpoints import CHECKPOINT
from diffusion2gan.distill.checks import check_discriminator, check_ranks, load_pairs_teacher
from diffusion2gan.distill.losses import Distance, build_distance
from diffusion2gan.distill.memory import check_r1_memory, out_of_memory_failure
from diffusion2gan.distill.reporting import Reports
from diffusion2gan.distill.run import Run, open_run
from diffusion2gan.distill.samples import PromptBatch, encode_sample_prompts, write_samples
from diffusion2gan.distill.steps import step
from diffusion2gan.distill.trackers import check_trackers
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import PairsSpec, read_shard
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.distributed import connect_ranks, get_ranks, resolve_device
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.precision import tf32_matmul
from diffusion2gan.runtime.progress import Bar, console
from diffusion2gan.runtime.stop import StepControl, stop_signal
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.prompt_cache import PromptCache


def distill(
    recipe: Recipe,
    pairs: Location,
    out: Path,
    allow_change: Sequence[str] = (),
    sample_prompts: Sequence[str] = (),
    trackers: Sequence[str] = (),
) -> None:
    """Trains until `recipe.total_pairs`.

    Writes checkpoints, log.jsonl, sample sheets and the page index.html into `out`. Under torchrun
    all ranks train one run, and rank 0 writes. SIGTERM saves the run and ends the process with exit
    code 0 (torchrun itself, if it receives the signal, ends with 1). `allow_change`: settings that
    may differ from those of the run in `out` (`open_run`). `sample_prompts`: further prompts that
    are sampled. `trackers`: names of trackers that receive the log.
    """
    check_trackers(trackers)

    # Device and ranks
    ranks = get_ranks()
    recipe = resolve_recipe(recipe, out)
    device = resolve_device(recipe.device)
    check_ranks(recipe, ranks.world_size)

    # Pairs and teacher
    reader = PairReader(pairs, recipe.seed)
    teacher = load_pairs_teacher(recipe, device, reader.spec, pairs)
    check_discriminator(recipe, teacher, reader, pairs)

    # Distance: the regression loss
    distance = build_distance(recipe, teacher.device, teacher)

    # Run: a new one, or the one in `out`
    lock = exclusive_lock(out / CHECKPOINT) if ranks.is_main else nullcontext()
    with lock, connect_ranks(device) as group, tf32_matmul(device.type):
        run = Run(recipe, teacher, group)
        check_r1_memory(run)
        open_run(run, out, reader.spec, allow_change)
        prompt_batches = encode_sample_prompts(teacher, sample_prompts)
        free_memory(run, pairs, reader.spec)
        try:
            train(run, reader, distance, out, prompt_batches, trackers)
        except torch.OutOfMemoryError as error:
            raise out_of_memory_failure(run, error) from error
        finally:
            run.wait_until_saved()


def train(
    run: Run,
    reader: PairReader,
    distance: Distance,
    out: Path,
    prompt_batches: Sequence[PromptBatch] = (),
    trackers: Sequence[str] = (),
) -> None:
    """The training loop."""
    recipe = run.recipe
    is_main = run.group.ranks.is_main
    batches = prefetch(run, reader.batches(recipe.batch_size, run.pairs_seen))
    bar = Bar(f"distill {recipe.loss}", recipe.total_pairs, run.pairs_seen)
    reports = Reports(run, reader.spec, out, trackers)

    with stop_signal() as stopped, reports, bar, closing(batches):
        control = StepControl(stopped, is_main, recipe.checkpoint_every_s)
        while run.pairs_seen < recipe.total_pairs:
            # Step: the discriminator's update, then the student's
            pairs_before = run.pairs_seen
            metrics, flags = step(run, next(batches), distance, control.request)

            # Log
            reports.add(metrics)
            bar.advance(recipe.batch_size, run.health.status())

            # Samples, each time that `pairs_seen` passes a multiple of `sample_every`
            if pairs_before // recipe.sample_every != run.pairs_seen // recipe.sample_every:
                reports.show_samples(write_samples(run, out, reader, prompt_batches))

            # Checkpoint: not right after skipped steps, so that the one from before them is kept
            if flags.stop or flags.save:
                reports.log_all()
                if flags.stop or run.health.skipped_in_a_row == 0:
                    run.save(out)
                    control.checkpoint_written()

            # Stop
            if flags.stop:
                run.wait_until_saved()
                exit_after_signal(stopped(), run, out)

        reports.log_all()
        run.save(out)
        run.wait_until_saved()
        reports.show_samples(write_samples(run, out, reader, prompt_batches))


def free_memory(run: Run, folder: Location, spec: PairsSpec) -> None:
    """Removes the models that training does not use from the device.

    These are the text encoders, if the prompts' embeddings are kept on disk, and the teacher's
    network and VAE, if the recipe does not need them.
    """
    recipe = run.recipe
    teacher = run.teacher

    if recipe.prompt_embeds == "kept":
        if not isinstance(folder, Path):
            raise UserError(
                f"prompt_embeds=kept writes the prompts' embeddings beside the pairs, and {folder} "
                "is not a folder on this machine. Copy the pairs to a folder, or set "
                "prompt_embeds=encoded."
            )
        prompts: list[str] = []
        for shard in range(spec.num_shards):
            prompts += read_shard(folder, shard).prompts
        cache = PromptCache(folder / f"prompts-{teacher.revision}", prompts, teacher.encode)
        teacher.cache_prompts(cache)

    teacher.offload(network=not recipe.needs_teacher, vae=not recipe.needs_vae)


def exit_after_signal(number: int | None, run: Run, out: Path) -> NoReturn:
    """Ends the process of a saved run: Ctrl-C counts as an interrupt, SIGTERM as success."""
    message = (
        f"stopped and saved: {run.pairs_seen} of {run.recipe.total_pairs} pairs are in {out}; run "
        "the same command to continue"
    )
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    console.print(message, soft_wrap=True)
    raise SystemExit(0)
