"""What each rank of `test_ranks.py` runs: two updates, in several ways.

Usage: ranks_worker.py FOLDER, alone or under torchrun. Each rank writes its results to
FOLDER/NAME-RANK, NAME being w{world size}a{gradient accumulation steps} or w{world size}nan.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
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

CPU = torch.device("cpu")
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


def perturb_discriminator(run: Run) -> None:
    """So that none of its convolutions is zero."""
    assert run.discriminator is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.discriminator.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def add_nan_hooks(run: Run) -> list[Any]:
    """NaN in one gradient of the student and one of the discriminator."""
    assert run.discriminator is not None
    student_parameter = next(run.student.trained.parameters())
    discriminator_parameter = next(run.discriminator.parameters())
    hooks = []
    for parameter in (student_parameter, discriminator_parameter):
        hooks.append(parameter.register_hook(lambda gradient: gradient * float("nan")))
    return hooks


@contextmanager
def record_collectives() -> Iterator[list[str]]:
    """The names of torch.distributed's collectives that are called inside the block."""
    names: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return real(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(patch.object(dist, name, recorded(name)))
        yield names


def take_two_steps(
    recipe: Recipe, pairs: Path, group: Group, out: Path, nan_rank: int | None = None
) -> None:
    """Two updates, the first with R1; `nan_rank` has NaN in its gradients of the first."""
    run = Run(recipe, load_teacher(recipe.teacher), group)
    perturb_discriminator(run)
    distance = build_distance(recipe, CPU)
    batches = PairReader(pairs, 0).batches(recipe.batch_size)
    rank = group.ranks.rank

    # First step
    hooks = add_nan_hooks(run) if rank == nan_rank else []
    first_entry = step(run, next(batches), distance)[0].read()
    for hook in hooks:
        hook.remove()
    gradients = {}
    for number, parameter in enumerate(run.student.trained.parameters()):
        if parameter.grad is not None:
            gradients[f"g{number}"] = parameter.grad.clone()

    # Second step
    with record_collectives() as collectives:
        second_entry = step(run, next(batches), distance)[0].read()

    assert run.discriminator is not None
    tensors = {
        **checkpoint.pack("student", run.student.trained),
        **checkpoint.pack("d", run.discriminator),
        **checkpoint.pack("ema", run.ema),
        **gradients,
    }
    meta = {"entries": json.dumps([first_entry, second_entry]), "collectives": collectives}
    checkpoint.save(out.with_name(f"{out.name}-{rank}"), tensors, meta)


def main(folder: Path) -> None:
    settings = json.loads((folder / "recipe.json").read_text())
    pairs = folder / "pairs"
    with connect_ranks(CPU) as group:
        world_size = group.ranks.world_size
        for accumulation in (1, 2):
            recipe = Recipe(**{**settings, "gradient_accumulation_steps": accumulation})
            take_two_steps(recipe, pairs, group, folder / f"w{world_size}a{accumulation}")
        take_two_steps(
            Recipe(**settings),
            pairs,
            group,
            folder / f"w{world_size}nan",
            nan_rank=world_size - 1,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
