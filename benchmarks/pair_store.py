"""What storing and reading pairs costs: 20 000 of SD 1.5's size, beside a WebDataset and an LMDB of the same pairs.

    python benchmarks/pair_store.py            # needs: pip install webdataset lmdb, and 3 GB of disk

Latents are Gaussian: nothing to compress, so sizes are upper bounds. Every reader gives shuffled batches of 64 float32
latents with prompts and seeds, by two workers (threads here, processes for the others), over the whole set. Cold: after
the files' pages were dropped from memory (posix_fadvise); warm: the second time. One run each, no intervals. Writes
docs/results/pair_store.json.
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
BATCH, WORKERS, SHARD = 64, 2, 1000
OUT = Path(__file__).parents[1] / "docs" / "results" / "pair_store.json"
PROMPT = "a photograph of a small blue boat on a quiet lake at dawn, mist over the water, number {}"


def pairs_of(spec: PairsSpec, shard: int) -> Pairs:
    """Gaussian latents in place of a teacher's."""
    indices = spec.shard_indices(shard)
    latents = torch.randn(len(indices), *SHAPE, generator=torch.Generator().manual_seed(shard))
    seeds = [pair_seed(0, i) for i in indices]
    return Pairs(list(indices), seeds, [PROMPT.format(i) for i in indices], latents)


def write_parquet(folder: Path, count: int, keep_noise: bool = False) -> float:
    """Seconds spent in writing alone."""
    spec = PairsSpec("none", "none", "none", count, 0, 50, 3.0, SHAPE, SHARD, keep_noise)
    store.start_set(folder, spec)
    took_s = 0.0
    for shard in range(spec.num_shards):
        pairs = pairs_of(spec, shard)
        start = time.perf_counter()
        store.write_shard(folder, shard, spec, pairs, pairs.latents.flip(0) if keep_noise else None)
        took_s += time.perf_counter() - start
    return took_s


def write_lmdb(folder: Path, made: Path) -> float:
    spec, took_s = store.open_set(made), 0.0
    environment = lmdb.open(str(folder), map_size=2**34, subdir=True)
    for shard in range(spec.num_shards):
        pairs = store.read_shard(made, shard, spec=spec, dtype=torch.float16)
        start = time.perf_counter()
        with environment.begin(write=True) as transaction:
            for index, seed, prompt, latents in zip(
                pairs.index, pairs.seed, pairs.prompts, pairs.latents, strict=True
            ):
                about = json.dumps({"seed": seed, "prompt": prompt}).encode()
                value = len(about).to_bytes(4, "little") + about + latents.numpy().tobytes()
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
    batches = PairReader(folder, seed, WORKERS).batches(BATCH)
    for _ in range(count // BATCH):
        batch = next(batches)
        yield batch.seed, batch.prompts, batch.latents


def tar_row(row: dict[str, Any]) -> tuple[int, str, np.ndarray]:
    about = json.loads(row["json"])
    return (
        about["seed"],
        about["prompt"],
        np.load(io.BytesIO(row["latents.npy"]), allow_pickle=False),
    )


def read_webdataset(folder: Path, count: int, seed: int) -> Iterator[Batch]:
    urls = [str(folder / tar_name(shard)) for shard in range(count // SHARD)]
    data = wds.WebDataset(
        urls, shardshuffle=100, seed=seed, workersplitter=wds.split_by_worker, empty_check=False
    )
    data = data.shuffle(SHARD).map(tar_row).batched(BATCH, collation_fn=collate, partial=False)
    yield from DataLoader(data, batch_size=None, num_workers=WORKERS, prefetch_factor=4)


class Lmdb(Dataset[tuple[int, str, np.ndarray]]):
    def __init__(self, folder: Path, order: list[int]) -> None:
        self.folder, self.order = folder, order
        self.transaction: Any = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> tuple[int, str, np.ndarray]:
        if self.transaction is None:
            environment = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=False)
            self.transaction = environment.begin(buffers=True)
        value = self.transaction.get(f"{self.order[place]:08d}".encode())
        start = 4 + int.from_bytes(value[:4], "little")
        about = json.loads(bytes(value[4:start]))
        return (
            about["seed"],
            about["prompt"],
            np.frombuffer(value[start:], np.float16).reshape(SHAPE),
        )


def read_lmdb(folder: Path, count: int, seed: int) -> Iterator[Batch]:
    order = np.random.default_rng(seed).permutation(count).tolist()
    yield from DataLoader(
        Lmdb(folder, order), BATCH, num_workers=WORKERS, collate_fn=collate, drop_last=True
    )


def forget(folder: Path) -> None:
    """Drops the files' pages from memory."""
    os.sync()
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pace(batches: Iterator[Batch]) -> tuple[float, float]:
    """Pairs a second, the start included, and microseconds of processor a pair, workers included."""
    start, cpu_s, seen = time.perf_counter(), processor_s(), 0
    for seeds, _, latents in batches:
        seen += len(seeds)
        assert latents.shape == (BATCH, *SHAPE) and latents.dtype == torch.float32
    return seen / (time.perf_counter() - start), (processor_s() - cpu_s) / seen * 1e6


def processor_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def size_kib(folder: Path) -> float:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir() if path.is_file()) / 1024


def measure(
    name: str,
    folder: Path,
    count: int,
    took_s: float,
    read: Callable[[Path, int, int], Iterator[Batch]],
) -> dict[str, Any]:
    forget(folder)
    row = {"kib_per_pair": size_kib(folder) / count, "write_pairs_per_s": count / took_s}
    row["read_cold_pairs_per_s"], row["read_cold_cpu_us_per_pair"] = pace(read(folder, count, 0))
    row["read_warm_pairs_per_s"], row["read_warm_cpu_us_per_pair"] = pace(read(folder, count, 1))
    print(name, {key: round(value, 2) for key, value in row.items()}, flush=True)
    return {key: round(value, 2) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument(
        "--folder", type=Path, help="where the sets are written; a temporary folder if not given"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--note", default="", help="kept in the JSON: what else the machine was doing"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    count, systems = args.count // SHARD * SHARD, {}

    def keep(name: str, row: dict[str, Any]) -> None:
        systems[name] = row
        write_json(
            args.out,
            {
                "command": shlex.join(["python", "benchmarks/pair_store.py", *sys.argv[1:]]),
                "count": count,
                "latent_shape": SHAPE,
                "batch_size": BATCH,
                "workers": WORKERS,
                "systems": systems,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "load_average": os.getloadavg()[1],
                "note": args.note,
            },
        )

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        base = Path(name)
        took_s = write_parquet(base / "parquet", count)
        keep("parquet", measure("parquet", base / "parquet", count, took_s, read_parquet))
        few = max(SHARD, count // 5)
        took_s = write_parquet(base / "noise", few, keep_noise=True)
        row = {
            "kib_per_pair": size_kib(base / "noise") / few,
            "write_pairs_per_s": few / took_s,
            "count": few,
        }
        keep("parquet_with_noise", {key: round(value, 2) for key, value in row.items()})
        start = time.perf_counter()
        export_webdataset(base / "parquet", base / "tars")  # reading included
        took_s = time.perf_counter() - start
        keep("webdataset", measure("webdataset", base / "tars", count, took_s, read_webdataset))
        took_s = write_lmdb(base / "lmdb", base / "parquet")
        keep("lmdb", measure("lmdb", base / "lmdb", count, took_s, read_lmdb))


if __name__ == "__main__":
    main()
