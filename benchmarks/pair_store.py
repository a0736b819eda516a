"""The cost of storing and reading pairs: ours, a WebDataset and an LMDB of the same 20 000 pairs.

    pip install webdataset lmdb
    python benchmarks/pair_store.py

The pairs have the size of Stable Diffusion 1.5's; 3 GB of disk are needed. Latents are Gaussian,
which cannot be compressed, so sizes are upper bounds. Every reader gives shuffled batches of 64
float32 latents with prompts and seeds, by two workers (threads for ours, processes for the others),
over the complete set. Cold: after the files' pages were dropped from memory (posix_fadvise); warm:
the second time. One run each, without intervals. Writes docs/results/pair_store.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion2gan.noise import pair_seed
from diffusion2gan.pairs import store
from diffusion2gan.pairs.exchange import export_webdataset, tar_name
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec
from diffusion2gan.runtime.files import write_json

SHAPE = (4, 64, 64)
BATCH_SIZE = 64
NUM_WORKERS = 2
SHARD_SIZE = 1000
OUT = Path(__file__).parents[1] / "docs" / "results" / "pair_store.json"
PROMPT = "a photograph of a small blue boat on a quiet lake at dawn, mist over the water, number {}"


def random_pairs(spec: PairsSpec, shard: int) -> Pairs:
    """Pairs with Gaussian latents instead of a teacher's."""
    indices = spec.shard_indices(shard)
    latents = torch.randn(len(indices), *SHAPE, generator=torch.Generator().manual_seed(shard))
    seeds = [pair_seed(0, i) for i in indices]
    return Pairs(list(indices), seeds, [PROMPT.format(i) for i in indices], latents)


def write_parquet(folder: Path, count: int, keep_noise: bool = False) -> float:
    """Writes the set and returns the seconds spent writing it."""
    spec = PairsSpec("none", "none", "none", count, 0, 50, 3.0, SHAPE, SHARD_SIZE, keep_noise)
    store.start_set(folder, spec)
    took_s = 0.0
    for shard in range(spec.num_shards):
        pairs = random_pairs(spec, shard)
        noise = pairs.latents.flip(0) if keep_noise else None
        start = time.perf_counter()
        store.write_shard(folder, shard, spec, pairs, noise)
        took_s += time.perf_counter() - start
    return took_s


def write_lmdb(folder: Path, parquet: Path) -> float:
    """Writes the pairs of a parquet set and returns the seconds spent writing them."""
    spec = store.open_set(parquet)
    took_s = 0.0
    environment = lmdb.open(str(folder), map_size=2**34, subdir=True)
    for shard in range(spec.num_shards):
        pairs = store.read_shard(parquet, shard, spec=spec, dtype=torch.float16)
        start = time.perf_counter()
        with environment.begin(write=True) as transaction:
            for index, seed, prompt, latents in zip(
                pairs.index, pairs.seed, pairs.prompts, pairs.latents, strict=True
            ):
                header = json.dumps({"seed": seed, "prompt": prompt}).encode()
                value = len(header).to_bytes(4, "little") + header + latents.numpy().tobytes()
                transaction.put(f"{index:08d}".encode(), value)
        took_s += time.perf_counter() - start

    start = time.perf_counter()
    environment.sync(True)
    environment.close()
    return took_s + time.perf_counter() - start


Batch = tuple[list[int], list[str], Tensor]


def collate(rows: list[tuple[int, str, np.ndarray]]) -> Batch:
    seeds, prompts, latents = zip(*rows, strict=True)
    return list(seeds), list(prompts), torch.from_numpy(np.stack(latents)).float()


def read_parquet(folder: Path, count: int, seed: int) -> Iterator[Batch]:
    batches = PairReader(folder, seed, NUM_WORKERS).batches(BATCH_SIZE)
    for _ in range(count // BATCH_SIZE):
        batch = next(batches)
        yield batch.seed, batch.prompts, batch.latents


def tar_row(row: dict[str, Any]) -> tuple[int, str, np.ndarray]:
    header = json.loads(row["json"])
    return (
        header["seed"],
        header["prompt"],
        np.load(io.BytesIO(row["latents.npy"]), allow_pickle=False),
    )


def read_webdataset(folder: Path, count: int, seed: int) -> Iterator[Batch]:
    urls = [str(folder / tar_name(shard)) for shard in range(count // SHARD_SIZE)]
    data = wds.WebDataset(
        urls, shardshuffle=100, seed=seed, workersplitter=wds.split_by_worker, empty_check=False
    )
    data = (
        data.shuffle(SHARD_SIZE)
        .map(tar_row)
        .batched(BATCH_SIZE, collation_fn=collate, partial=False)
    )
    yield from DataLoader(data, batch_size=None, num_workers=NUM_WORKERS, prefetch_factor=4)


class Lmdb(Dataset[tuple[int, str, np.ndarray]]):
    """The pairs in a given order. Each worker process opens the database for itself."""

    def __init__(self, folder: Path, order: list[int]) -> None:
        self.folder = folder
        self.order = order
        self.transaction: Any = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[int, str, np.ndarray]:
        if self.transaction is None:
            environment = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=False)
            self.transaction = environment.begin(buffers=True)
        value = self.transaction.get(f"{self.order[position]:08d}".encode())
        start = 4 + int.from_bytes(value[:4], "little")
        header = json.loads(bytes(value[4:start]))
        return (
            header["seed"],
            header["prompt"],
            np.frombuffer(value[start:], np.float16).reshape(SHAPE),
        )


def read_lmdb(folder: Path, count: int, seed: int) -> Iterator[Batch]:
    order = np.random.default_rng(seed).permutation(count).tolist()
    yield from DataLoader(
        Lmdb(folder, order), BATCH_SIZE, num_workers=NUM_WORKERS, collate_fn=collate, drop_last=True
    )


def drop_page_cache(folder: Path) -> None:
    """Drops the pages of the folder's files from memory."""
    os.sync()
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_speed(batches: Iterator[Batch]) -> tuple[float, float]:
    """Pairs per second, start-up included, and CPU microseconds per pair, workers included."""
    start = time.perf_counter()
    start_cpu_s = cpu_s()
    num_pairs = 0
    for seeds, _, latents in batches:
        num_pairs += len(seeds)
        assert latents.shape == (BATCH_SIZE, *SHAPE) and latents.dtype == torch.float32
    pairs_per_s = num_pairs / (time.perf_counter() - start)
    return pairs_per_s, (cpu_s() - start_cpu_s) / num_pairs * 1e6


def cpu_s() -> float:
    """CPU seconds of this process and its finished children so far."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def size_kib(folder: Path) -> float:
    """Disk space of the folder's files."""
    num_blocks = sum(path.stat().st_blocks for path in folder.iterdir() if path.is_file())
    return num_blocks * 512 / 1024


def measure(
    name: str,
    folder: Path,
    count: int,
    took_s: float,
    read: Callable[[Path, int, int], Iterator[Batch]],
) -> dict[str, Any]:
    """Size, writing speed and reading speed, cold and warm, of one store."""
    drop_page_cache(folder)
    row = {"kib_per_pair": size_kib(folder) / count, "write_pairs_per_s": count / took_s}
    row["read_cold_pairs_per_s"], row["read_cold_cpu_us_per_pair"] = read_speed(
        read(folder, count, 0)
    )
    row["read_warm_pairs_per_s"], row["read_warm_cpu_us_per_pair"] = read_speed(
        read(folder, count, 1)
    )
    row = {key: round(value, 2) for key, value in row.items()}
    print(name, row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument(
        "--folder", type=Path, help="where the sets are written; a temporary folder by default"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--note", default="", help="a remark for the JSON, for example what else is running"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = args.count // SHARD_SIZE * SHARD_SIZE
    systems = {}

    def save(name: str, row: dict[str, Any]) -> None:
        systems[name] = row
        write_json(
            args.out,
            {
                "command": shlex.join(["python", "benchmarks/pair_store.py", *sys.argv[1:]]),
                "count": count,
                "latent_shape": SHAPE,
                "batch_size": BATCH_SIZE,
                "workers": NUM_WORKERS,
                "systems": systems,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "load_average": os.getloadavg()[1],
                "note": args.note,
            },
        )

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        base = Path(name)

        # Our store
        took_s = write_parquet(base / "parquet", count)
        save("parquet", measure("parquet", base / "parquet", count, took_s, read_parquet))

        # Our store with the noise, on a fifth of the pairs
        noise_count = max(SHARD_SIZE, count // 5)
        took_s = write_parquet(base / "noise", noise_count, keep_noise=True)
        row = {
            "kib_per_pair": round(size_kib(base / "noise") / noise_count, 2),
            "write_pairs_per_s": round(noise_count / took_s, 2),
            "count": noise_count,
        }
        save("parquet_with_noise", row)

        # WebDataset: the time to read the pairs is included in the time to write them
        start = time.perf_counter()
        export_webdataset(base / "parquet", base / "tars")
        took_s = time.perf_counter() - start
        save("webdataset", measure("webdataset", base / "tars", count, took_s, read_webdataset))

        # LMDB
        took_s = write_lmdb(base / "lmdb", base / "parquet")
        save("lmdb", measure("lmdb", base / "lmdb", count, took_s, read_lmdb))


if __name__ == "__main__":
    main()
