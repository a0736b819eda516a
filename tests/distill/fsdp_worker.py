"""What each rank of `test_fsdp.py` does, `fsdp_worker.py FOLDER OUT`: a step with NaN on one, then a good one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import fsdp
from diffusion2gan.runtime.distributed import connect_ranks
from diffusion2gan.teacher.loading import load_teacher


def states(run: Run) -> list[Tensor]:
    """All that is cut: weights, moments, the average."""
    assert run.discriminator is not None and run.discriminator_optimizer is not None
    modules = [
        value
        for part in (run.student.trained, run.discriminator)
        for value in part.state_dict().values()
    ]
    optimizers = (run.optimizer, run.discriminator_optimizer)
    moments = [
        x for o in optimizers for entry in o.state.values() for x in entry.values() if x.ndim > 0
    ]
    return [*modules, *moments, *run.ema.shadow.values()]


def weights(run: Run) -> Tensor:
    return torch.cat(
        [fsdp.full_tensor(x.detach()).flatten() for x in states(run) if x.is_floating_point()]
    )


def main(folder: Path, out: Path) -> None:
    described = json.loads((folder / "recipe.json").read_text())
    recipe = Recipe(**described | {"strategy": "fsdp"})
    with connect_ranks(torch.device("cpu")) as group:
        run = Run(recipe, load_teacher(recipe.teacher), group)
        assert run.discriminator is not None
        distance, batches = (
            build_distance(recipe, torch.device("cpu")),
            PairReader(folder / "pairs", 0).batches(8),
        )
        step(run, next(batches), distance)
        before = weights(run)
        factor = float("nan") if group.ranks.rank == 1 else 1.0
        hook = run.discriminator.register_forward_hook(
            lambda module, args, answer: [x * factor for x in answer]
        )
        bad, _ = step(run, next(batches), distance)
        hook.remove()
        moved_while_poisoned = float((weights(run) - before).abs().max())
        good, _ = step(run, next(batches), distance)
        parts = sum(x.to_local().numel() for x in states(run))
        told = {
            "poisoned": [math.isfinite(bad[key]) for key in ("grad_norm", "d_grad_norm")],
            "well": [math.isfinite(good[key]) for key in ("grad_norm", "d_grad_norm")],
            "moved_while_poisoned": moved_while_poisoned,
            "moved": float((weights(run) - before).abs().max()),
            "share": parts / sum(x.numel() for x in states(run)),
        }
        (out / f"{group.ranks.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
