"""The order of reading: a pure function of (seed, position), so that a run resumes exactly.

It knows nothing of ranks: every rank reads the same global batches and takes its own rows of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion2gan.errors import UserError
from diffusion2gan.pairs.store import (
    ROW_GROUP,
    Pairs,
    PairsSpec,
    open_set,
    present_shards,
    read_shard,
    shard_name,
)
from diffusion2gan.runtime.storage import Location

WINDOW = 128  # row groups shuffled together: 16 384 pairs
WINDOW_BYTES = 2**29  # at most, of latents: what 16 384 pairs of SD 1.5 have


@dataclass(frozen=True)
class Window:
    """Shards that are shuffled together, and the order in which their pairs are read, from `skip` on."""

    shards: list[int]
    order: NDArray[np.int64]
    skip: int


def window_order(seed: int, epoch: int, window: int, num_pairs: int) -> NDArray[np.int64]:
    """[num_pairs] a permutation, by (seed, epoch, window) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) + window])).permutation(
        num_pairs
    )


def shards_per_window(spec: PairsSpec) -> int:
    """How many shards are shuffled together: by the set alone, so that the order is the same everywhere."""
    pairs = min(WINDOW * ROW_GROUP, WINDOW_BYTES // (2 * prod(spec.latent_shape)))
    return max(1, pairs // min(spec.shard_size, spec.count))


def windows(seed: int, epoch: int, spec: PairsSpec) -> list[list[int]]:
    """The epoch's shards in random order, cut into windows."""
    order = (
        np.random.Generator(np.random.Philox(key=[seed, epoch]))
        .permutation(spec.num_shards)
        .tolist()
    )
    size = shards_per_window(spec)
    return [order[i : i + size] for i in range(0, spec.num_shards, size)]


def plan(seed: int, spec: PairsSpec, position: int) -> Iterator[Window]:
    """The endless windows, from the one that holds pair `position` of the endless order."""
    epoch, skip = divmod(position, spec.count)
    while True:
        for number, shards in enumerate(windows(seed, epoch, spec)):
            size = sum(len(spec.shard_indices(shard)) for shard in shards)
            if skip < size:
                yield Window(shards, window_order(seed, epoch, number, size), skip)
            skip = max(0, skip - size)
        epoch += 1


class PairReader:
    """Batches of a finished set, shuffled anew each epoch, from any position.

    `workers` threads read the next window while one is in use (decoding holds no interpreter lock): two windows are
    in memory, as float16.
    """

    def __init__(self, folder: Location, seed: int, workers: int = 2) -> None:
        self.spec: PairsSpec = open_set(folder)
        self._folder, self._seed, self._workers = folder, seed, workers
        there = set(present_shards(folder, self.spec))
        if missing := [shard for shard in range(self.spec.num_shards) if shard not in there]:
            raise UserError(
                f"{folder} is not complete: {len(missing)} of {self.spec.num_shards} shards are missing (first: "
                f"{shard_name(missing[0])}); run the same `pairs` command again."
            )

    def first(self, count: int) -> Pairs:
        """The set's pairs 0 to count − 1, or all where there are fewer."""
        parts: list[Pairs] = []
        for shard in range(self.spec.num_shards):
            if sum(map(len, parts)) < count:
                parts.append(read_shard(self._folder, shard, spec=self.spec))
        return Pairs.concat(parts).rows(range(min(count, self.spec.count)))

    def batches(self, batch_size: int, position: int = 0) -> Iterator[Pairs]:
        """Endless batches of `batch_size`, starting at pair `position` of the endless order."""
        held: list[Pairs] = []
        for pairs, order in self._windows(position):
            start = 0
            while start < len(order):
                stop = start + batch_size - sum(map(len, held))
                held.append(pairs.rows(order[start:stop].tolist()))
                start = stop
                if sum(map(len, held)) == batch_size:
                    batch, held = Pairs.concat(held), []
                    yield replace(batch, latents=batch.latents.float())

    def _windows(self, position: int) -> Iterator[tuple[Pairs, NDArray[np.int64]]]:
        """Each window's pairs and the rest of its order; the next one is read meanwhile."""
        pool = ThreadPoolExecutor(self._workers, "pairs")
        ahead: deque[tuple[Window, list[Future[Pairs]]]] = deque()
        try:
            for window in plan(self._seed, self.spec, position):
                ahead.append((window, [pool.submit(self._read, shard) for shard in window.shards]))
                if len(ahead) == 2:
                    yield self._finished(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _finished(
        self, window: Window, futures: list[Future[Pairs]]
    ) -> tuple[Pairs, NDArray[np.int64]]:
        return Pairs.concat([future.result() for future in futures]), window.order[window.skip :]

    def _read(self, shard: int) -> Pairs:
        return read_shard(self._folder, shard, spec=self.spec, dtype=torch.float16)
