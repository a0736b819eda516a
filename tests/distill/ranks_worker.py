"""What each rank of `test_ranks.py` does under torchrun: `ranks_worker.py FOLDER`, the first writes what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import step
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import Group, connect_ranks
from diffusion2gan.teacher.loading import load_teacher

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all",
    "barrier",
    "reduce",
    "gather",
    "scatter",
    "all_gather_object",
    "broadcast_object_list",
    "send",
    "recv",
)


def stir(run: Run) -> None:
    """Every convolution of D says something."""
    assert run.discriminator is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.discriminator.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def poison(run: Run) -> list[Any]:
    """NaN in one gradient of each player."""
    assert run.discriminator is not None
    victims = (next(run.student.trained.parameters()), next(run.discriminator.parameters()))
    return [victim.register_hook(lambda gradient: gradient * float("nan")) for victim in victims]


@contextmanager
def exchanges() -> Iterator[list[str]]:
    """The names of torch.distributed's collectives, as they are called."""
    made: list[str] = []
    with ExitStack() as stack:
        for name in COLLECTIVES:
            whole = getattr(dist, name)
            stack.enter_context(
                patch.object(
                    dist,
                    name,
                    lambda *a, name=name, whole=whole, **k: (made.append(name), whole(*a, **k))[1],
                )
            )
        yield made


def two_steps(
    recipe: Recipe, pairs: Path, group: Group, out: Path, poisoned: int | None = None
) -> None:
    """Two updates, the second without R1; the rank `poisoned` has NaN in its gradients of the first."""
    run = Run(recipe, load_teacher(recipe.teacher), group)
    stir(run)
    distance, batches = (
        build_distance(recipe, torch.device("cpu")),
        PairReader(pairs, 0).batches(recipe.batch_size),
    )
    hooks = poison(run) if group.ranks.rank == poisoned else []
    entries = [step(run, next(batches), distance)[0]]
    gradients = {
        f"g{i}": p.grad.clone()
        for i, p in enumerate(run.student.trained.parameters())
        if p.grad is not None
    }
    for hook in hooks:
        hook.remove()
    with exchanges() as made:
        entries.append(step(run, next(batches), distance)[0])
    assert run.discriminator is not None
    tensors = (
        checkpoint.pack("student", run.student.trained)
        | checkpoint.pack("d", run.discriminator)
        | gradients
    )
    tensors |= {f"ema/{key}": value for key, value in run.ema.shadow.items()}
    said = {"entries": json.dumps(entries), "exchanges": made}
    checkpoint.save(out.with_name(f"{out.name}-{group.ranks.rank}"), tensors, said)


def main(folder: Path) -> None:
    described = json.loads((folder / "recipe.json").read_text())
    with connect_ranks(torch.device("cpu")) as group:
        world = group.ranks.world_size
        for gradient_accumulation_steps in (1, 2):
            recipe = Recipe(
                **described | {"gradient_accumulation_steps": gradient_accumulation_steps}
            )
            two_steps(
                recipe, folder / "pairs", group, folder / f"w{world}a{gradient_accumulation_steps}"
            )
        two_steps(
            Recipe(**described),
            folder / "pairs",
            group,
            folder / f"w{world}nan",
            poisoned=world - 1,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
