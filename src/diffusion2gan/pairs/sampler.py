"""The order of reading: a pure function of (seed, position), so that a run resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.pairs.store import ROW_GROUP, Pairs, PairsSpec, open_set, present_shards, read_shard, shard_path

WINDOW = 128  # row groups shuffled together: 16 384 pairs, 0.5 GB of SD-size latents


def window_order(seed: int, epoch: int, window: int, num_pairs: int) -> np.ndarray:
    """[num_pairs] a permutation, by (seed, epoch, window) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) + window])).permutation(num_pairs)


def windows(seed: int, epoch: int, num_groups: int) -> list[np.ndarray]:
    """The epoch's row groups in random order, cut into windows."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_groups)
    return [order[i : i + WINDOW] for i in range(0, num_groups, WINDOW)]


class PairReader:
    """Batches of a finished set, shuffled anew each epoch, from any position."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.spec: PairsSpec = open_set(folder)
        self._folder, self._seed = folder, seed
        missing = self.spec.num_shards - len(present_shards(folder, self.spec))
        if missing:
            raise UserError(
                f"{folder} is not complete: {missing} of {self.spec.num_shards} shards are missing (first: "
                f"{_first_missing(folder, self.spec)}); run the same `pairs` command again."
            )
        self._groups = [
            (shard, group)
            for shard in range(self.spec.num_shards)
            for group in range(-(-len(self.spec.shard_indices(shard)) // ROW_GROUP))
        ]

    def batches(self, batch_size: int, position: int = 0) -> Iterator[Pairs]:
        """Endless batches of `batch_size`, starting at pair `position` of the endless order."""
        rest: Pairs | None = None
        for pairs in self._windows(position):
            pairs = pairs if rest is None else Pairs.concat([rest, pairs])
            whole_batches = len(pairs) // batch_size * batch_size
            for start in range(0, whole_batches, batch_size):
                yield pairs.rows(range(start, start + batch_size))
            rest = pairs.rows(range(whole_batches, len(pairs)))

    def _windows(self, position: int) -> Iterator[Pairs]:
        epoch, skip = divmod(position, self.spec.count)
        while True:
            for number, groups in enumerate(windows(self._seed, epoch, len(self._groups))):
                size = sum(self._group_size(int(g)) for g in groups)
                if skip >= size:
                    skip -= size
                    continue
                pairs = self._read(groups)
                order = window_order(self._seed, epoch, number, size)[skip:]
                skip = 0
                yield pairs.rows(order.tolist())
            epoch += 1

    def _group_size(self, group: int) -> int:
        shard, place = self._groups[group]
        return min(ROW_GROUP, len(self.spec.shard_indices(shard)) - place * ROW_GROUP)

    def _read(self, groups: np.ndarray) -> Pairs:
        places = [self._groups[int(g)] for g in groups]
        return Pairs.concat([read_shard(self._folder, shard, [group]) for shard, group in places])


def _first_missing(folder: Path, spec: PairsSpec) -> str:
    return next(shard_path(folder, s).name for s in range(spec.num_shards) if not shard_path(folder, s).exists())
