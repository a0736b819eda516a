"""What each rank of `test_fsdp.py` runs: one checkpoint, then SIGKILL while it writes the next.

Usage: sharded_checkpoint_worker.py FOLDER OUT. Both ranks are killed, rank 1 before it writes its
shards and rank 0 after: a rank that survived could remove the shards, or be terminated first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from diffusion2gan.distill.checkpoints import CHECKPOINT
from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run, open_run
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.distributed import connect_ranks
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.teacher.loading import load_teacher

real_write_data = HuggingFaceStorageWriter.write_data


def kill_before_writing(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_writing(*args: Any) -> None:
    real_write_data(*args)
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, out: Path) -> None:
    settings = json.loads((folder / "recipe.json").read_text())
    recipe = Recipe(**{**settings, "strategy": "fsdp"})
    device = torch.device("cpu")
    with connect_ranks(device) as group:
        rank = group.ranks.rank
        with exclusive_lock(out / f"{CHECKPOINT}-{rank}"):
            run = Run(recipe, load_teacher(recipe.teacher), group)
            reader = PairReader(folder / "pairs", 0)
            open_run(run, out, reader.spec)
            distance = build_distance(recipe, device)
            batches = reader.batches(8)

            # A checkpoint
            step(run, next(batches), distance)
            run.save(out)
            run.wait_until_saved()

            # Another one, that is never finished
            step(run, next(batches), distance)
            write_data = kill_before_writing if rank == 1 else kill_after_writing
            HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]
            run.save(out)
            run.wait_until_saved()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
