"""Reading pairs in random order.

The order is a pure function of (seed, position), so that a run resumes exactly. It does not depend
on ranks: every rank reads the same global batches and uses its rows.

Each epoch shuffles the shards and cuts them into windows; the pairs of a window are shuffled
together. A pair's position counts over all epochs.
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
WINDOW_BYTES = 2**29  # at most, of float16 latents: 16 384 pairs of SD 1.5
NUM_WINDOWS_IN_MEMORY = 2  # one in use, one being read


@dataclass(frozen=True)
class Window:
    """Shards that are shuffled together, and the order of their pairs, used from `skip` on."""

    shards: list[int]
    order: NDArray[np.int64]
    skip: int


def window_order(seed: int, epoch: int, window: int, num_pairs: int) -> NDArray[np.int64]:
    """[num_pairs] a permutation that depends on (seed, epoch, window) alone."""
    bits = np.random.Philox(key=[seed, (epoch << 32) + window])
    return np.random.Generator(bits).permutation(num_pairs)


def shards_per_window(spec: PairsSpec) -> int:
    """The number of shards in a window. It depends on the set alone, so that the order does too."""
    bytes_per_pair = 2 * prod(spec.latent_shape)
    num_pairs = min(WINDOW * ROW_GROUP, WINDOW_BYTES // bytes_per_pair)
    return max(1, num_pairs // min(spec.shard_size, spec.count))


def epoch_windows(seed: int, epoch: int, spec: PairsSpec) -> list[list[int]]:
    """The shards of an epoch in random order, cut into windows."""
    bits = np.random.Philox(key=[seed, epoch])
    order = np.random.Generator(bits).permutation(spec.num_shards).tolist()
    size = shards_per_window(spec)
    return [order[start : start + size] for start in range(0, spec.num_shards, size)]


def windows_from(seed: int, spec: PairsSpec, position: int) -> Iterator[Window]:
    """Endless windows, starting with the one that contains the pair at `position`."""
    epoch, skip = divmod(position, spec.count)
    while True:
        for number, shards in enumerate(epoch_windows(seed, epoch, spec)):
            size = sum(len(spec.shard_indices(shard)) for shard in shards)
            if skip < size:
                yield Window(shards, window_order(seed, epoch, number, size), skip)
            skip = max(0, skip - size)
        epoch += 1


class PairReader:
    """Batches of a complete set, shuffled differently in each epoch, from any position.

    `workers` threads read the next window while one is in use (decoding releases the GIL). Two
    windows are in memory, as float16.
    """

    def __init__(self, folder: Location, seed: int, workers: int = 2) -> None:
        self.spec: PairsSpec = open_set(folder)
        self._folder = folder
        self._seed = seed
        self._workers = workers

        present = set(present_shards(folder, self.spec))
        missing = [shard for shard in range(self.spec.num_shards) if shard not in present]
        if missing:
            raise UserError(
                f"{folder} is not complete: {len(missing)} of {self.spec.num_shards} shards are "
                f"missing (first: {shard_name(missing[0])}); run the same `pairs` command again."
            )

    def first(self, count: int) -> Pairs:
        """The set's pairs 0 to count − 1, or all of them if there are fewer."""
        shards: list[Pairs] = []
        num_read = 0
        for shard in range(self.spec.num_shards):
            if num_read >= count:
                break
            shards.append(read_shard(self._folder, shard, spec=self.spec))
            num_read += len(shards[-1])
        return Pairs.concat(shards).rows(range(min(count, self.spec.count)))

    def batches(self, batch_size: int, position: int = 0) -> Iterator[Pairs]:
        """Endless batches of `batch_size`, starting with the pair at `position`.

        A batch may span several windows: its pieces are collected until it is full.
        """
        pieces: list[Pairs] = []
        num_missing = batch_size
        for pairs, order in self._read_windows(position):
            start = 0
            while start < len(order):
                rows = order[start : start + num_missing].tolist()
                pieces.append(pairs.rows(rows))
                start += len(rows)
                num_missing -= len(rows)

                if num_missing == 0:
                    batch = Pairs.concat(pieces)
                    yield replace(batch, latents=batch.latents.float())
                    pieces = []
                    num_missing = batch_size

    def _read_windows(self, position: int) -> Iterator[tuple[Pairs, NDArray[np.int64]]]:
        """Yields (pairs, order of those not skipped) per window, while the next one is read."""
        pool = ThreadPoolExecutor(self._workers, "pairs")
        pending: deque[tuple[Window, list[Future[Pairs]]]] = deque()
        try:
            for window in windows_from(self._seed, self.spec, position):
                futures = [pool.submit(self._read, shard) for shard in window.shards]
                pending.append((window, futures))
                if len(pending) == NUM_WINDOWS_IN_MEMORY:
                    yield _wait_for_window(*pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, shard: int) -> Pairs:
        return read_shard(self._folder, shard, spec=self.spec, dtype=torch.float16)


def _wait_for_window(
    window: Window, futures: list[Future[Pairs]]
) -> tuple[Pairs, NDArray[np.int64]]:
    # A separate function, so that no local variable of the caller keeps the shards in memory.
    pairs = Pairs.concat([future.result() for future in futures])
    return pairs, window.order[window.skip :]
