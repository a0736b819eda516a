"""`diffusion2gan pairs`: noise → latents by the teacher's ODE, shard by shard. Run it again to continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs.store import (
    Pairs,
    PairsSpec,
    lock_shard,
    present_shards,
    start_set,
    write_shard,
)
from diffusion2gan.runtime.distributed import get_ranks
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.ode import solve_ode
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.sanity_check import warn_if_implausible

WAIT_S = 0.5  # between looks at what other ranks have made
PromptsOf = Callable[[Sequence[int]], list[str]]
Solve = Callable[[range], Pairs]


def make_pairs(
    teacher: Teacher,
    prompts_of: PromptsOf,
    spec: PairsSpec,
    folder: Location,
    batch_size: int = 64,
    shards: range | None = None,
) -> None:
    """Solves the ODE of every pair whose shard is not there yet; of `shards` alone where they are given.

    Under torchrun each rank takes every N-th of them. A pair depends neither on `batch_size` nor on who makes it.
    """
    wanted, here = list(check_range(shards, spec)), get_ranks()
    start_set(folder, spec)
    if here.is_main and made(folder, spec, wanted) < pairs_in(spec, wanted):
        first = noise_from_seeds([pair_seed(spec.seed, 0)], spec.latent_shape).to(teacher.device)
        warn_if_implausible(teacher, first, teacher.unconditional())
    solve = solver(teacher, prompts_of, spec)
    with Bar("pairs", pairs_in(spec, wanted), made(folder, spec, wanted)) as bar:
        for shard in wanted[here.rank :: here.world_size]:
            if shard not in present_shards(folder, spec):
                with lock_shard(folder, shard):
                    make_shard(solve, spec, folder, shard, batch_size, bar)
            bar.reach(made(folder, spec, wanted))
        while (
            here.is_main
            and here.world_size > 1
            and (done := made(folder, spec, wanted)) < pairs_in(spec, wanted)
        ):
            bar.reach(done)
            time.sleep(WAIT_S)
        bar.reach(made(folder, spec, wanted))


def make_shard(
    solve: Solve, spec: PairsSpec, folder: Location, shard: int, batch_size: int, bar: Bar
) -> None:
    """One shard, unless another process has finished it since the look at the folder."""
    if shard in present_shards(folder, spec):
        return
    indices, batches = spec.shard_indices(shard), []
    for start in range(indices.start, indices.stop, batch_size):
        batch = range(start, min(start + batch_size, indices.stop))
        batches.append(solve(batch))
        bar.advance(len(batch))
    pairs = Pairs.concat(batches)
    noise = noise_from_seeds(pairs.seed, spec.latent_shape) if spec.keep_noise else None
    write_shard(folder, shard, spec, pairs, noise)


def check_range(shards: range | None, spec: PairsSpec) -> range:
    """All shards, or the range asked for. Raises UserError where that is empty or not inside the set."""
    if shards is None:
        return range(spec.num_shards)
    if not 0 <= shards.start < shards.stop <= spec.num_shards:
        raise UserError(
            f"--shard-range {shards.start}:{shards.stop} is not inside the set: it has shards 0 to "
            f"{spec.num_shards - 1}, so 0:{spec.num_shards} is all of it"
        )
    return shards


def pairs_in(spec: PairsSpec, shards: Sequence[int]) -> int:
    return sum(len(spec.shard_indices(shard)) for shard in shards)


def made(folder: Location, spec: PairsSpec, wanted: Sequence[int]) -> int:
    """How many pairs of the wanted shards are there, whoever made them."""
    return pairs_in(spec, sorted(set(wanted) & set(present_shards(folder, spec))))


def solver(teacher: Teacher, prompts_of: PromptsOf, spec: PairsSpec) -> Solve:
    """Solves pairs of a set, by their numbers, together; guided away from what the stock pipeline has for no prompt."""
    uncond = teacher.unconditional()

    def solve(indices: range) -> Pairs:
        seeds, prompts = [pair_seed(spec.seed, i) for i in indices], prompts_of(indices)
        noise, cond = (
            noise_from_seeds(seeds, spec.latent_shape).to(teacher.device),
            teacher.encode(prompts),
        )
        without = uncond.expand(len(indices))
        latents = solve_ode(
            teacher, noise, cond, without, spec.num_inference_steps, spec.guidance_scale
        )
        return Pairs(list(indices), seeds, prompts, latents.cpu())

    return solve
