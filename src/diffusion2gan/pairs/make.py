"""Makes pairs, shard by shard: noise → latents by the teacher's ODE. An interrupted job resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs.store import (
    Pairs,
    PairsSpec,
    check_latents_finite,
    lock_shard,
    present_shards,
    shard_name,
    start_set,
    write_shard,
)
from diffusion2gan.prompts import prompts_digest
from diffusion2gan.runtime.distributed import BARRIER_TIMEOUT_S, get_ranks
from diffusion2gan.runtime.progress import Bar, console
from diffusion2gan.runtime.storage import Location
from diffusion2gan.runtime.transfer import to_device
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.ode import check_solver, solve_ode
from diffusion2gan.teacher.pipeline import Teacher, warn_truncated
from diffusion2gan.teacher.sanity_check import count_implausible, warn_if_implausible
from diffusion2gan.teacher.schedule import DEFAULT_SOLVER, default_num_steps

POLL_S = 0.5  # how often the main rank counts what the other ranks have finished

PromptFunction = Callable[[Sequence[int]], list[str]]
# Prompts of a set: a list, repeated from its start if the set has more pairs, or a function from
# the indices of pairs to their prompts.
Prompts = Sequence[str] | PromptFunction


@dataclass(frozen=True)
class PairsSettings:
    """How a set is made, beside its teacher and prompts.

    `seed`, 0 to 255: sets of different seeds share no noise. `negative_prompt` takes the place of
    no prompt in guidance. `solver` and `num_inference_steps`:
    see `solve_ode`; None is `default_num_steps`. `shard_size`: pairs per file. `keep_noise` stores
    each pair's noise beside its seed.
    """

    count: int
    seed: int = 0
    solver: str = DEFAULT_SOLVER
    negative_prompt: str = ""
    num_inference_steps: int | None = None
    guidance_scale: float = 3.0
    shard_size: int = 128
    keep_noise: bool = False


def build_spec(
    teacher: Teacher, prompts: Prompts, settings: PairsSettings, prompts_name: str = ""
) -> PairsSpec:
    """The description of the set that `make_pairs` makes with these arguments.

    A list of prompts is identified by its digest, a function of indices by `prompts_name`. The
    precision is the teacher's. Raises UserError if the solver is unknown, the teacher cannot take
    that many steps, or a negative prompt has no effect.
    """
    check_solver(settings.solver)
    check_negative_prompt(teacher, settings)
    num_steps = settings.num_inference_steps
    if num_steps is None:
        num_steps = default_num_steps(settings.solver, teacher.family.flow, teacher.zero_snr)
    teacher.steps(num_steps, settings.solver)  # refuses too many
    return PairsSpec(
        teacher=teacher.name,
        revision=teacher.revision,
        prompts=prompts_name if callable(prompts) else prompts_digest(prompts),
        count=settings.count,
        seed=settings.seed,
        num_inference_steps=num_steps,
        guidance_scale=settings.guidance_scale,
        latent_shape=teacher.latent_shape,
        shard_size=settings.shard_size,
        keep_noise=settings.keep_noise,
        solver=settings.solver,
        precision=teacher.precision,
        negative_prompt=settings.negative_prompt,
    )


def check_negative_prompt(teacher: Teacher, settings: PairsSettings) -> None:
    """Raises UserError if there is a negative prompt but no classifier-free guidance."""
    if not settings.negative_prompt:
        return
    if teacher.guidance != "classifier_free":
        raise UserError(
            f"{teacher.name} has no classifier-free guidance, so --negative-prompt has no effect; "
            "leave it out."
        )
    if settings.guidance_scale <= 1:
        raise UserError(
            f"--guidance-scale {settings.guidance_scale:g} turns guidance off, so "
            "--negative-prompt has no effect; leave it out, or give a scale above 1."
        )


def check_same_precision(teacher: Teacher, spec: PairsSpec) -> None:
    """Raises UserError if the teacher's network is not in the precision of the set."""
    if teacher.precision != spec.precision:
        raise UserError(
            f"the pairs are of a network in {spec.precision}, but the teacher's is in "
            f"{teacher.precision}; set it by Teacher.set_precision({spec.precision!r})."
        )


def prepare_prompts(teacher: Teacher, prompts: Prompts) -> PromptFunction:
    """The prompts as a function of indices.

    If prompts of a list are longer than the teacher's token limit, prints one warning for all.
    """
    if callable(prompts):
        return prompts
    lines = prompts
    teacher.truncation_warned = warn_truncated(teacher.tokenizer, lines, teacher.num_tokens)

    def get_prompts(indices: Sequence[int]) -> list[str]:
        return [lines[i % len(lines)] for i in indices]

    return get_prompts


def make_pairs(
    teacher: Teacher,
    prompts: Prompts,
    spec: PairsSpec,
    folder: Location,
    batch_size: int = 64,
    shards: range | None = None,
    offload: bool = False,
) -> None:
    """Makes the pairs of every shard of the set that is not in `folder` yet.

    `shards` restricts it to a range of shards. Under torchrun, rank r of N makes every N-th shard.
    A pair depends neither on `batch_size` nor on the rank that makes it. `offload`: the VAE is on
    the CPU, and so are the text encoders except while they encode the prompts of a shard. Prints
    how many pairs fail the sanity check. Raises UserError if `folder` has another set, the range is
    not inside the set, or the teacher is in another precision.
    """
    check_same_precision(teacher, spec)
    requested = list(check_range(shards, spec))
    num_requested = count_pairs(spec, requested)
    ranks = get_ranks()
    get_prompts = prepare_prompts(teacher, prompts)
    start_set(folder, spec)

    # Check the teacher's output on the first noise, unless there is nothing to do
    if ranks.is_main and count_finished(folder, spec, requested) < num_requested:
        noise = noise_from_seeds([pair_seed(spec.seed, 0)], spec.latent_shape).to(teacher.device)
        warn_if_implausible(teacher, noise, teacher.unconditional())

    uncond = teacher.unconditional(spec.negative_prompt)
    if offload:
        teacher.offload(network=False, vae=True)
    num_made = 0
    num_implausible = 0

    def solve_batches(batches: list[range]) -> Iterator[Pairs]:
        nonlocal num_made, num_implausible
        prompts = [get_prompts(batch) for batch in batches]
        encoded = encode_and_offload(teacher, prompts) if offload else None
        for i, batch in enumerate(batches):
            cond = teacher.encode(prompts[i]) if encoded is None else encoded[i].to(teacher.device)
            try:
                pairs = solve_pairs(teacher, spec, batch, prompts[i], uncond, cond)
            except torch.OutOfMemoryError as error:
                raise out_of_memory_failure(teacher, len(batch), offload, error) from error
            num_implausible += count_implausible(pairs.latents)
            num_made += len(pairs)
            yield pairs

    with Bar("pairs", num_requested, count_finished(folder, spec, requested)) as bar:
        # This rank's shards
        for shard in requested[ranks.rank :: ranks.world_size]:
            if shard not in present_shards(folder, spec):
                with lock_shard(folder, shard):
                    make_shard(solve_batches, spec, folder, shard, batch_size, bar)
            bar.reach(count_finished(folder, spec, requested))

        # The main rank waits for the others, which it does not communicate with
        if ranks.is_main and ranks.world_size > 1:
            wait_for_other_ranks(folder, spec, requested, bar)
        bar.reach(count_finished(folder, spec, requested))
    report_implausible(num_implausible, num_made, spec.precision)


def wait_for_other_ranks(
    folder: Location, spec: PairsSpec, requested: Sequence[int], bar: Bar
) -> None:
    """Shows the progress of the other ranks until all requested shards exist.

    Raises Failure if no shard has been finished for BARRIER_TIMEOUT_S.
    """
    num_requested = count_pairs(spec, requested)
    num_finished = count_finished(folder, spec, requested)
    last_progress = time.monotonic()
    while num_finished < num_requested:
        if time.monotonic() - last_progress > BARRIER_TIMEOUT_S:
            missing = sorted(set(requested) - set(present_shards(folder, spec)))
            raise Failure(
                f"rank 0 has made its shards, but no other rank has finished one for "
                f"{BARRIER_TIMEOUT_S:.0f} s: {len(missing)} of {len(requested)} shards are missing "
                f"in {folder}, the first is number {missing[0]}. WORLD_SIZE="
                f"{get_ranks().world_size} in the environment: check the machines of the other "
                "ranks, or unset RANK and WORLD_SIZE if there are none. Finished shards are kept; "
                "run the same command to continue. If a shard takes longer, raise "
                "DIFFUSION2GAN_RANK_TIMEOUT_S, a sixth of this limit."
            )
        time.sleep(POLL_S)
        previous = num_finished
        num_finished = count_finished(folder, spec, requested)
        bar.reach(num_finished)
        if num_finished > previous:
            last_progress = time.monotonic()


def encode_and_offload(teacher: Teacher, prompts: list[list[str]]) -> list[Conditioning]:
    """The conditioning of each batch of prompts, on the CPU, where the text encoders are then."""
    teacher.move_text_encoders(teacher.device)
    encoded = [teacher.encode(batch).to("cpu") for batch in prompts]
    teacher.move_text_encoders("cpu")
    return encoded


def out_of_memory_failure(
    teacher: Teacher, batch_size: int, offload: bool, error: torch.OutOfMemoryError
) -> Failure:
    """The error for a batch that the GPU has too little memory for: what is needed, what helps."""
    num_bytes = 0
    for component in teacher.pipeline.components.values():
        if isinstance(component, nn.Module):
            for parameter in component.parameters():
                num_bytes += parameter.numel() * parameter.element_size()
    remedies = []
    if batch_size > 1:
        remedies.append(f"--batch-size {batch_size // 2}")
    if not offload:
        remedies.append("--offload, which keeps the VAE and the text encoders on the CPU")
    if teacher.precision == "float32":
        remedies.append("--precision bfloat16, in a new set")
    remedy = f" What needs less: {'; '.join(remedies)}." if remedies else ""
    return Failure(
        f"out of memory with batches of {batch_size} on {teacher.device} "
        f"({str(error).splitlines()[0]}). The teacher's weights take {num_bytes / 2**30:.2f} GiB "
        f"(counted), and the network's activations more.{remedy} Finished shards are kept; a set "
        "continues with another batch size, and with or without --offload."
    )


def report_implausible(num_implausible: int, num_made: int, precision: str) -> None:
    """Prints how many of the pairs that this process made fail the sanity check, if any."""
    if num_implausible == 0:
        return
    hint = "Look at some of them before training"
    if precision == "float16":
        hint += "; float16 overflows in some networks, and bfloat16 does not"
    console.print(
        f"warning: {num_implausible} of {num_made} pairs ({num_implausible / num_made:.1%}) fail "
        f"the sanity check: their latents vary more than latents do. {hint}.",
        soft_wrap=True,
    )


def make_shard(
    solve_batches: Callable[[list[range]], Iterator[Pairs]],
    spec: PairsSpec,
    folder: Location,
    shard: int,
    batch_size: int,
    bar: Bar,
) -> None:
    """Makes and writes one shard, unless another process has finished it before it was locked."""
    if shard in present_shards(folder, spec):
        return
    indices = spec.shard_indices(shard)
    batches = []
    for start in range(indices.start, indices.stop, batch_size):
        batches.append(range(start, min(start + batch_size, indices.stop)))

    solved = []
    for batch in solve_batches(batches):
        solved.append(batch)
        bar.advance(len(batch))

    pairs = Pairs.concat(solved)
    check_latents_finite(pairs, f"{folder}/{shard_name(shard)} was not written")
    noise = noise_from_seeds(pairs.seed, spec.latent_shape) if spec.keep_noise else None
    write_shard(folder, shard, spec, pairs, noise)


def solve_pairs(
    teacher: Teacher,
    spec: PairsSpec,
    indices: range,
    prompts: list[str],
    uncond: Conditioning,
    cond: Conditioning,
) -> Pairs:
    """Solves the teacher's ODE for the pairs `indices` of a set, as one batch; returns CPU tensors.

    `cond` is the conditioning of the prompts. `uncond` is the conditioning of guidance for no
    prompt or the set's negative prompt, as the stock pipeline has it (`Teacher.unconditional`).
    """
    seeds = [pair_seed(spec.seed, i) for i in indices]
    noise = to_device(noise_from_seeds(seeds, spec.latent_shape), teacher.device)
    latents = solve_ode(
        teacher,
        noise,
        cond,
        uncond.expand(len(indices)),
        spec.num_inference_steps,
        spec.guidance_scale,
        spec.solver,
    )
    return Pairs(list(indices), seeds, prompts, latents.cpu())


def check_range(shards: range | None, spec: PairsSpec) -> range:
    """`shards`, or all shards if it is None. Raises UserError if it is empty or not in the set."""
    if shards is None:
        return range(spec.num_shards)
    if not 0 <= shards.start < shards.stop <= spec.num_shards:
        raise UserError(
            f"--shard-range {shards.start}:{shards.stop} is not inside the set: it has shards 0 to "
            f"{spec.num_shards - 1}, so 0:{spec.num_shards} is all of it"
        )
    return shards


def count_pairs(spec: PairsSpec, shards: Sequence[int]) -> int:
    return sum(len(spec.shard_indices(shard)) for shard in shards)


def count_finished(folder: Location, spec: PairsSpec, requested: Sequence[int]) -> int:
    """The number of pairs in those of the requested shards that exist, of any process."""
    return count_pairs(spec, sorted(set(requested) & set(present_shards(folder, spec))))
