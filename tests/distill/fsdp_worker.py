"""What each rank of `test_fsdp.py` runs: three steps, the second with NaN on rank 1.

Usage: fsdp_worker.py FOLDER OUT. Writes OUT/RANK.json.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.errors import Failure
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import fsdp
from diffusion2gan.runtime.distributed import connect_ranks
from diffusion2gan.teacher.loading import load_teacher


def sharded_tensors(run: Run) -> list[Tensor]:
    """All tensors that are sharded: weights, Adam's averages, the EMA."""
    assert run.discriminator is not None and run.discriminator_optimizer is not None
    tensors = [
        *run.student.trained.state_dict().values(),
        *run.discriminator.state_dict().values(),
        *run.ema.shadow.values(),
    ]
    for optimizer in (run.optimizer, run.discriminator_optimizer):
        for state in optimizer.state.values():
            tensors += [tensor for tensor in state.values() if tensor.ndim > 0]
    return tensors


def full_state(run: Run) -> Tensor:
    """All of them in one vector, gathered from the ranks."""
    values = []
    for tensor in sharded_tensors(run):
        if tensor.is_floating_point():
            values.append(fsdp.full_tensor(tensor.detach()).flatten())
    return torch.cat(values)


def finite_norms(entry: dict[str, Any]) -> list[bool]:
    return [math.isfinite(entry["grad_norm"]), math.isfinite(entry["d_grad_norm"])]


def save_with_nan(run: Run, folder: Path) -> str:
    """The error of saving while a weight in the shard of rank 1 is NaN."""
    weight = next(iter(run.student.trained.parameters()))
    with torch.no_grad():
        if run.group.ranks.rank == 1:
            fsdp.local_shard(weight).view(-1)[-1] = math.nan
    try:
        run.save(folder)
    except Failure as error:
        return str(error)
    return ""


def main(folder: Path, out: Path) -> None:
    settings = json.loads((folder / "recipe.json").read_text())
    recipe = Recipe(**{**settings, "strategy": "fsdp"})
    device = torch.device("cpu")
    with connect_ranks(device) as group:
        run = Run(recipe, load_teacher(recipe.teacher), group)
        assert run.discriminator is not None
        distance = build_distance(recipe, device)
        batches = PairReader(folder / "pairs", 0).batches(8)
        step(run, next(batches), distance)
        before = full_state(run)

        # A step with NaN logits on rank 1
        factor = float("nan") if group.ranks.rank == 1 else 1.0
        hook = run.discriminator.register_forward_hook(
            lambda module, args, logits: [head * factor for head in logits]
        )
        nan_entry = step(run, next(batches), distance)[0].read()
        hook.remove()
        change_with_nan = float((full_state(run) - before).abs().max())

        # A good one
        good_entry = step(run, next(batches), distance)[0].read()
        change = float((full_state(run) - before).abs().max())

        # A weight that is NaN in the shard of rank 1 alone: no rank writes a checkpoint
        message = save_with_nan(run, out / "run")

        tensors = sharded_tensors(run)
        num_local = sum(tensor.to_local().numel() for tensor in tensors)  # type: ignore[attr-defined]
        result = {
            "finite_with_nan": finite_norms(nan_entry),
            "finite": finite_norms(good_entry),
            "change_with_nan": change_with_nan,
            "change": change,
            "message": message,
            "local_share": num_local / sum(tensor.numel() for tensor in tensors),
        }
        (out / f"{group.ranks.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
