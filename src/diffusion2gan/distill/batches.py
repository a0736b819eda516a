"""Batches in host memory: read, with their noises and kept embeddings, before they are needed."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffusion2gan.distill.run import Run
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import Pairs
from diffusion2gan.runtime.transfer import pin
from diffusion2gan.teacher.conditioning import Conditioning


@dataclass(frozen=True)
class HostBatch:
    """A global batch in host memory, in pinned memory if the device is a GPU."""

    pairs: Pairs
    latents: Tensor  # [B, C, h, w], the teacher's, of the global batch
    rows: slice  # of this rank
    noise: Tensor  # [b, C, h, w], of these rows
    cond: Conditioning | None  # of these rows, if the embeddings are kept on disk


def prepare(run: Run, pairs: Pairs) -> HostBatch:
    """Computes the noises of this rank's rows, and reads their embeddings if they are kept."""
    teacher = run.teacher
    ranks = run.group.ranks
    size = len(pairs) // ranks.world_size
    rows = slice(ranks.rank * size, (ranks.rank + 1) * size)
    to_pinned = partial(pin, device=teacher.device)

    noise = noise_from_seeds(pairs.seed[rows], teacher.latent_shape)
    cond = None
    if teacher.prompts is not None:
        cond = teacher.prompts.read(pairs.prompts[rows]).map(to_pinned)
    return HostBatch(pairs, to_pinned(pairs.latents), rows, to_pinned(noise), cond)


def prefetch(run: Run, batches: Iterator[Pairs]) -> Generator[HostBatch, None, None]:
    """`batches`, prepared; for a GPU, each in a thread while the one before it is in use.

    On a CPU a thread would only take time from the step.
    """
    if run.teacher.device.type == "cpu":
        for pairs in batches:
            yield prepare(run, pairs)
        return

    def prepare_next() -> HostBatch | None:
        pairs = next(batches, None)
        return None if pairs is None else prepare(run, pairs)

    def start_thread() -> None:
        # Pinned memory belongs to the thread's current GPU, which would be the first
        if run.teacher.device.type == "cuda":
            torch.cuda.set_device(run.teacher.device)

    with ThreadPoolExecutor(1, "batches", initializer=start_thread) as pool:
        pending = pool.submit(prepare_next)
        while (batch := pending.result()) is not None:
            pending = pool.submit(prepare_next)
            yield batch
