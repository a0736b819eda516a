"""The progress of a set of pairs, from the disk alone, and its verification."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import check_same_precision, solve_pairs
from diffusion2gan.pairs.store import (
    Pairs,
    PairsSpec,
    check_pairs,
    column_to_tensor,
    open_set,
    present_shards,
    read_shard,
    read_table,
    read_unchecked,
    shard_name,
)
from diffusion2gan.runtime.progress import Bar, clock
from diffusion2gan.runtime.storage import Entry, Location, list_files
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher

NUM_RECENT = 64  # the speed is computed from this many of the newest shards
# A set counts as idle if its newest shard is older than the time for 10 shards plus a minute.
IDLE_FACTOR = 10
IDLE_MARGIN_S = 60
# Relative error of a pair that is solved again: float16 on disk causes 5e-4, another batch size or
# device less. For a pair of another seed it is about 1.
DEEP_TOLERANCE = 0.01
# With a network in reduced precision, whose rounding may depend on batch size and device. bfloat16
# itself costs the pocket teacher 0.8 %.
REDUCED_DEEP_TOLERANCE = 0.05


def info(folder: Location, now_s: float) -> dict[str, Any]:
    """How much of the set exists, how fast it grows and when it will be complete.

    `now_s`: seconds since 1970.
    """
    spec = open_set(folder)
    files = list_files(folder)
    present: dict[int, Entry] = {}
    missing: list[int] = []
    for shard in range(spec.num_shards):
        if shard_name(shard) in files:
            present[shard] = files[shard_name(shard)]
        else:
            missing.append(shard)

    # Progress and size
    num_pairs = sum(len(spec.shard_indices(shard)) for shard in present)
    num_bytes = sum(entry.num_bytes for entry in present.values())
    kib_per_pair = num_bytes / 1024 / max(1, num_pairs)
    report = {
        "made": f"{num_pairs} of {spec.count} pairs, {len(present)} of {spec.num_shards} shards",
        "size": f"{num_bytes / 2**20:.1f} MiB, {kib_per_pair:.2f} KiB per pair",
    }

    # Missing shards and time left
    if missing:
        report["missing"] = spans(missing)
        report |= _speed(spec, present, spec.count - num_pairs, now_s)
    return report


def _speed(
    spec: PairsSpec, present: dict[int, Entry], num_missing: int, now_s: float
) -> dict[str, str]:
    """Speed and time left, from the modification times of the newest shards.

    They are unknown if the times are inconsistent, for example after a clock was set back.
    """
    newest = sorted(present.items(), key=lambda item: item[1].modified_s)[-NUM_RECENT:]
    if len(newest) < 2:
        return {"pace": "unknown yet"}
    first_s = newest[0][1].modified_s
    last_s = newest[-1][1].modified_s
    took_s = last_s - first_s
    idle_s = now_s - last_s
    if took_s <= 0 or idle_s < 0:
        return {
            "pace": "unknown: the modification times of the shards are inconsistent (was a clock "
            "set back, or the set copied?)"
        }
    if idle_s > IDLE_FACTOR * took_s / (len(newest) - 1) + IDLE_MARGIN_S:
        return {
            "pace": f"none: the newest shard is {clock(idle_s)} old; run the same command to "
            "continue"
        }

    # The oldest of these shards marks the start; its pairs were made before
    num_pairs = sum(len(spec.shard_indices(shard)) for shard, _ in newest[1:])
    return {
        "pace": f"{num_pairs / took_s:.2f} pairs/s",
        "ETA": clock(num_missing * took_s / num_pairs),
    }


def spans(shards: Sequence[int], most: int = 8) -> str:
    """`0, 3-5, 9`: consecutive shards are joined; at most `most` spans are listed."""
    found: list[tuple[int, int]] = []  # first and last shard of each span
    for shard in shards:
        if found and found[-1][1] == shard - 1:
            found[-1] = (found[-1][0], shard)
        else:
            found.append((shard, shard))

    texts = []
    for first, last in found[:most]:
        texts.append(f"{first}" if first == last else f"{first}-{last}")
    text = ", ".join(texts)
    if len(found) > most:
        text += f" and {len(found) - most} more spans"
    return text


def verify(folder: Location) -> list[str]:
    """Reads every shard completely; returns one message per problem of the set.

    Checks what reading a shard checks, and: the indices and seeds of the pairs,
    that stored noise is its seed's bit for bit, and that no two pairs of the set share a noise or
    have the same latents.
    """
    spec = open_set(folder)
    problems: list[str] = []
    seeds: list[NDArray[Any]] = []
    noises: list[NDArray[Any]] = []
    latents: list[NDArray[Any]] = []

    # Each shard by itself
    with Bar("verify", spec.num_shards) as bar:
        for shard in range(spec.num_shards):
            try:
                pairs, noise = _read_with_noise(folder, shard, spec)
            except (Failure, UserError) as error:
                problems.append(str(error))
                continue
            problems += _check_shard(pairs, noise, spec, shard, f"{folder}/{shard_name(shard)}")
            seeds.append(np.array(pairs.seed))
            noises.append(digests(noise))
            latents.append(digests(pairs.latents))
            bar.advance(1)

    # Repetitions over all shards
    for what, values in {"seeds": seeds, "noises": noises, "latents": latents}.items():
        num_repeated = _count_repeated(values)
        if num_repeated:
            problems.append(f"{folder}: {num_repeated} {what} also belong to another pair")
    return problems


def _read_with_noise(folder: Location, shard: int, spec: PairsSpec) -> tuple[Pairs, Tensor]:
    """The pairs and their noise [B, C, h, w] float16: stored, or generated from the seeds."""
    pairs = read_unchecked(folder, shard, spec)
    if spec.keep_noise:
        return pairs, column_to_tensor(read_table(folder, shard, spec), "noise", spec)
    return pairs, noise_from_seeds(pairs.seed, spec.latent_shape).half()


def _check_shard(pairs: Pairs, noise: Tensor, spec: PairsSpec, shard: int, name: str) -> list[str]:
    problems = []
    try:
        check_pairs(pairs, spec, shard, name)
    except Failure as error:
        problems.append(str(error))
    if spec.keep_noise:
        expected = noise_from_seeds(pairs.seed, spec.latent_shape).half()
        if not torch.equal(noise, expected):
            problems.append(f"{name}: stored noise that does not match its seed")
    return problems


def digests(tensor: Tensor) -> NDArray[np.uint64]:
    """[B]: a 64-bit digest of each row."""
    rows = tensor.contiguous().numpy().reshape(len(tensor), -1)
    values = []
    for row in rows:
        digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
        values.append(int.from_bytes(digest, "little"))
    return np.array(values, np.uint64)


def _count_repeated(shards: Sequence[NDArray[Any]]) -> int:
    """The number of values, over all shards, that have occurred before."""
    if not shards:
        return 0
    values = np.concatenate(shards)
    return len(values) - len(np.unique(values))


def verify_deep(folder: Location, teacher: Teacher, count: int, seed: int = 0) -> list[str]:
    """Solves `count` random existing pairs again, from their seeds and prompts, and compares.

    Returns one message per pair whose relative error is above `DEEP_TOLERANCE`, or
    `REDUCED_DEEP_TOLERANCE`. Raises UserError if the set was made by another teacher, at another
    resolution or in another precision.
    """
    spec = open_set(folder)
    if spec.revision != teacher.revision:
        raise UserError(
            f"{folder} was made by teacher {spec.teacher!r} (weights {spec.revision}), but "
            f"--teacher is {teacher.name!r} (weights {teacher.revision}). Give the teacher that "
            "the set was made by, with the same --teacher-lora, --teacher-config and --vae."
        )
    if tuple(spec.latent_shape) != teacher.latent_shape:
        raise UserError(
            f"{folder} has latents of shape {tuple(spec.latent_shape)}, but the teacher's have "
            f"{teacher.latent_shape}. Give the --resolution that the set was made at."
        )

    check_same_precision(teacher, spec)

    # Choose the pairs
    existing: list[int] = []
    for shard in present_shards(folder, spec):
        existing += spec.shard_indices(shard)
    chosen = np.random.default_rng(seed).permutation(existing)[:count]

    # Solve and compare
    tolerance = DEEP_TOLERANCE if spec.precision == "float32" else REDUCED_DEEP_TOLERANCE
    uncond = teacher.unconditional(spec.negative_prompt)
    problems = []
    with Bar("solved again", len(chosen)) as bar:
        for index in sorted(chosen.tolist()):
            error = _solve_again(folder, teacher, spec, index, uncond)
            if not error <= tolerance:  # NaN is a problem too
                name = f"{folder}/{shard_name(index // spec.shard_size)}"
                problems.append(
                    f"{name}: pair {index} is not what the teacher computes (relative error "
                    f"{error:.2%})"
                )
            bar.advance(1)
    return problems


def _solve_again(
    folder: Location, teacher: Teacher, spec: PairsSpec, index: int, uncond: Conditioning
) -> float:
    """The relative error of a stored pair against the teacher's solution."""
    shard = index // spec.shard_size
    row = index - spec.shard_indices(shard).start
    stored = read_shard(folder, shard, spec=spec).rows([row])
    cond = teacher.encode(stored.prompts)
    solved = solve_pairs(teacher, spec, range(index, index + 1), stored.prompts, uncond, cond)
    return float((solved.latents - stored.latents).norm() / solved.latents.norm())
