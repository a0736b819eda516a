"""What digests and flushing to disk cost: a checkpoint's write and load, and a shard of pairs.

    python benchmarks/durability.py

Digests (sha256 of every tensor) are timed on a state of --gib GiB, as it is written and as it is
read from the page cache, the fastest disk there is. Flushing (fsync of the file and its folder) is
timed against the same write without it, in turns. Both are then related to the job: a checkpoint's
to the seconds between two checkpoints (it is written in the background), a shard's to the seconds
in which the pocket teacher, the fastest one, makes its pairs. Writes docs/results/durability.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from diffusion2gan.pairs import store
from diffusion2gan.pairs.make import PairsSettings, build_spec, make_pairs
from diffusion2gan.pocket.scenes import pairs_captions
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint, files, integrity
from diffusion2gan.runtime.files import write_json
from diffusion2gan.teacher.loading import load_teacher

OUT = Path(__file__).parents[1] / "docs" / "results" / "durability.json"
TENSOR_MIB = 16


def median_s(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each call; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def without_flushing() -> AbstractContextManager[object]:
    return patch.object(files, "_flush", lambda path: None)


def random_state(num_bytes: int) -> dict[str, Tensor]:
    """Tensors of TENSOR_MIB, of the bytes that training leaves: not compressible."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, num_bytes // (TENSOR_MIB * 2**20))
    state = {}
    for index in range(count):
        state[f"{index:04d}"] = torch.randn(TENSOR_MIB * 2**18, generator=generator)
    return state


def measure_checkpoint(folder: Path, num_bytes: int, repeats: int) -> dict[str, float]:
    state = random_state(num_bytes)
    size = sum(value.nbytes for value in state.values())
    path = folder / "checkpoint.safetensors"
    checkpoint.save(path, state, {})

    def save(flushes: bool, digests: bool) -> None:
        with nullcontext() if flushes else without_flushing():
            if digests:
                checkpoint.save(path, state, {})
                return
            with patch.object(integrity, "hash_tensors", lambda tensors: ""):
                checkpoint.save(path, state, {})

    def load(verify: str) -> None:
        os.environ[integrity.VARIABLE] = verify
        tensors, _ = checkpoint.load(path)
        for key, value in tensors.items():
            state[key].copy_(value)  # as into a network: the file itself is only mapped

    def hash_in_one_thread() -> None:
        for value in state.values():
            integrity.hash_tensors({"": value})

    seconds = median_s(
        {
            "hash": lambda: integrity.hash_tensors(state),
            "hash_in_one_thread": hash_in_one_thread,
            "write_plain": lambda: save(flushes=False, digests=False),
            "write_with_digest": lambda: save(flushes=False, digests=True),
            "write_flushed": lambda: save(flushes=True, digests=False),
            "write": lambda: save(flushes=True, digests=True),
            "load_unchecked": lambda: load("0"),
            "load": lambda: load("1"),
        },
        repeats,
    )
    del os.environ[integrity.VARIABLE]
    path.unlink()

    gib = size / 2**30
    every_s = Recipe(teacher="pocket").checkpoint_every_s
    return {
        "gib": gib,
        "hash_gb_per_s": size / 1e9 / seconds["hash"],
        "hash_gb_per_s_in_one_thread": size / 1e9 / seconds["hash_in_one_thread"],
        **{f"{name}_s": value for name, value in seconds.items()},
        "digest_share_of_write": seconds["hash"] / seconds["write"],
        "digest_share_of_load": 1 - seconds["load_unchecked"] / seconds["load"],
        "seconds_between_checkpoints": every_s,
        "added_share_of_training": (seconds["write"] - seconds["write_plain"]) / every_s,
    }


def measure_pairs(folder: Path, num_pairs: int, repeats: int) -> dict[str, float]:
    # How long the pocket teacher takes for a shard
    teacher = load_teacher("pocket")
    captions = pairs_captions(0)
    settings = PairsSettings(count=num_pairs, shard_size=num_pairs)
    spec = build_spec(teacher, captions, settings)
    start = time.perf_counter()
    make_pairs(teacher, captions, spec, folder / "pairs")
    make_s = time.perf_counter() - start

    # How long the shard takes to be written
    pairs = store.read_shard(folder / "pairs", 0)

    def write(flushes: bool) -> None:
        with nullcontext() if flushes else without_flushing():
            store.write_shard(folder / "pairs", 0, spec, pairs)

    seconds = median_s(
        {"plain": lambda: write(flushes=False), "flushed": lambda: write(flushes=True)}, repeats
    )
    return {
        "pairs_per_shard": num_pairs,
        "make_s": make_s,
        "write_plain_s": seconds["plain"],
        "write_s": seconds["flushed"],
        "added_share_of_pairs": (seconds["flushed"] - seconds["plain"]) / make_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--pairs", type=int, default=128, help="pairs per shard")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--note", default="", help="a remark for the JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        result: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/durability.py", *sys.argv[1:]]),
            "checkpoint": measure_checkpoint(Path(name), int(args.gib * 2**30), args.repeats),
            "pairs": measure_pairs(Path(name), args.pairs, 4 * args.repeats),
            "threads": files.NUM_HASH_THREADS,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg()[1],
            "note": args.note,
        }
    for part in ("checkpoint", "pairs"):
        result[part] = {key: round(value, 5) for key, value in result[part].items()}
        print(part, result[part])
    write_json(args.out, result)


if __name__ == "__main__":
    main()
