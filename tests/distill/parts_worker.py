"""What each rank of `test_fsdp.py` does, `parts_worker.py FOLDER OUT`: a checkpoint, and a kill in the next's parts.

Both die, one before its part and one after: a rank that lived might clear the parts away, or be ended before it does.
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

write_data = HuggingFaceStorageWriter.write_data


def killed(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def written_and_killed(*args: Any) -> None:
    write_data(*args)
    killed()


def main(folder: Path, out: Path) -> None:
    described = json.loads((folder / "recipe.json").read_text())
    recipe = Recipe(**described | {"strategy": "fsdp"})
    with (
        connect_ranks(torch.device("cpu")) as group,
        exclusive_lock(out / f"{CHECKPOINT}-{group.ranks.rank}"),
    ):
        run, reader = (
            Run(recipe, load_teacher(recipe.teacher), group),
            PairReader(folder / "pairs", 0),
        )
        open_run(run, out, reader.spec)
        distance, batches = build_distance(recipe, torch.device("cpu")), reader.batches(8)
        for number in (0, 1):
            step(run, next(batches), distance)
            if number == 1:
                last = killed if group.ranks.rank == 1 else written_and_killed
                HuggingFaceStorageWriter.write_data = last  # type: ignore[method-assign]
            run.save(out)
            run.wait_until_saved()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
