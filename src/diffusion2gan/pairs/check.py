"""What a set of pairs holds, told from the disk alone, and whether it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs.make import solver
from diffusion2gan.pairs.store import (
    Pairs,
    PairsSpec,
    column_to_tensor,
    open_set,
    present_shards,
    read_shard,
    read_table,
    shard_name,
)
from diffusion2gan.runtime.progress import Bar, clock
from diffusion2gan.runtime.storage import Entry, Location, list_files
from diffusion2gan.teacher.pipeline import Teacher

RECENT = 64  # shards that the pace is taken from
DEEP_TOLERANCE = 0.01  # relative: float16 on disk is 5e-4, batches and devices less; another seed's pair is about 1


def info(folder: Location, now_s: float) -> dict[str, Any]:
    """How much of the set is there, at what pace it grows and when it will be done. `now_s`: seconds since 1970."""
    spec, files = open_set(folder), list_files(folder)
    there = {
        shard: files[shard_name(shard)]
        for shard in range(spec.num_shards)
        if shard_name(shard) in files
    }
    made = sum(len(spec.shard_indices(shard)) for shard in there)
    size = sum(entry.num_bytes for entry in there.values())
    told = {
        "made": f"{made} of {spec.count} pairs, {len(there)} of {spec.num_shards} shards",
        "size": f"{size / 2**20:.1f} MiB, {size / 1024 / max(1, made):.2f} KiB a pair",
    }
    if made == spec.count:
        return told
    told["missing"] = spans([shard for shard in range(spec.num_shards) if shard not in there])
    return told | _pace(spec, there, spec.count - made, now_s)


def _pace(spec: PairsSpec, there: dict[int, Entry], missing: int, now_s: float) -> dict[str, str]:
    """Pace and time left by the last shards' times of writing; a clock that was set back makes them unknown."""
    newest = sorted(there.items(), key=lambda item: item[1].modified_s)[-RECENT:]
    if len(newest) < 2:
        return {"pace": "unknown yet"}
    took_s = newest[-1][1].modified_s - newest[0][1].modified_s
    pairs = sum(len(spec.shard_indices(shard)) for shard, _ in newest[1:])
    idle_s = now_s - newest[-1][1].modified_s
    if took_s <= 0 or idle_s < 0:
        return {
            "pace": "unknown: the shards' times make no sense (was a clock set back, or the set copied?)"
        }
    if idle_s > 10 * took_s / (len(newest) - 1) + 60:
        return {
            "pace": f"none: the newest shard is {clock(idle_s)} old; run the same command to continue"
        }
    return {"pace": f"{pairs / took_s:.2f} pairs/s", "ETA": clock(missing * took_s / pairs)}


def spans(shards: Sequence[int], most: int = 8) -> str:
    """`0, 3-5, 9`: half-open neighbours joined, cut after `most` spans."""
    parts: list[list[int]] = []
    for shard in shards:
        if parts and parts[-1][-1] == shard - 1:
            parts[-1][1:] = [shard]
        else:
            parts.append([shard])
    told = ", ".join("-".join(map(str, part)) for part in parts[:most])
    return told + (f" and {len(parts) - most} more spans" if len(parts) > most else "")


def verify(folder: Location) -> list[str]:
    """Reads every shard whole; returns what is wrong with the set, in words. Empty: all is well.

    Checked beside what reading a shard checks: the pairs' numbers and seeds, finite latents, stored noise being its
    seed's bit for bit; over the whole set that no two pairs share a noise or have the same latents.
    """
    spec, problems = open_set(folder), []
    seeds: list[NDArray[Any]] = []
    noises: list[NDArray[Any]] = []
    latents: list[NDArray[Any]] = []
    with Bar("verify", spec.num_shards) as bar:
        for shard in range(spec.num_shards):
            try:
                pairs, noise = _shard_with_noise(folder, shard, spec)
            except (Failure, UserError) as error:
                problems.append(str(error))
                continue
            problems += [
                f"{folder}/{shard_name(shard)}: {told}"
                for told in _problems(pairs, noise, spec, shard)
            ]
            seeds.append(np.array(pairs.seed))
            noises.append(digests(noise))
            latents.append(digests(pairs.latents))
            bar.advance(1)
    alike = {"seeds": seeds, "noises": noises, "latents": latents}
    return problems + [
        told for what, parts in alike.items() for told in _repeated(folder, what, parts)
    ]


def _shard_with_noise(folder: Location, shard: int, spec: PairsSpec) -> tuple[Pairs, Tensor]:
    """The pairs and their noises [B, C, h, w] float16: the stored ones, or drawn from the seeds."""
    pairs = read_shard(folder, shard, spec=spec)
    if spec.keep_noise:
        return pairs, column_to_tensor(read_table(folder, shard, spec), "noise", spec)
    return pairs, noise_from_seeds(pairs.seed, spec.latent_shape).half()


def _problems(pairs: Pairs, noise: Tensor, spec: PairsSpec, shard: int) -> list[str]:
    indices, problems = spec.shard_indices(shard), []
    if pairs.index != list(indices) or pairs.seed != [pair_seed(spec.seed, i) for i in indices]:
        problems.append(f"its pairs are not {indices.start}…{indices.stop - 1}")
    if not torch.isfinite(pairs.latents).all():
        problems.append("latents that are not finite")
    if spec.keep_noise and not torch.equal(
        noise, noise_from_seeds(pairs.seed, spec.latent_shape).half()
    ):
        problems.append("stored noise that is not its seed's")
    return problems


def digests(tensor: Tensor) -> NDArray[np.uint64]:
    """[B]: 64 bits of each row's content."""
    rows = tensor.contiguous().numpy().reshape(len(tensor), -1)
    return np.array(
        [
            int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")
            for row in rows
        ],
        np.uint64,
    )


def _repeated(folder: Location, what: str, parts: Sequence[NDArray[Any]]) -> list[str]:
    """Says how many of a set's values occur more than once."""
    if not parts:
        return []
    values = np.concatenate(parts)
    count = len(values) - len(np.unique(values))
    return [f"{folder}: {count} {what} that another pair has too"] if count else []


def verify_deep(folder: Location, teacher: Teacher, count: int, seed: int = 0) -> list[str]:
    """Solves `count` random pairs of the shards that are there anew, by seed and prompt, and compares.

    Returns one line a pair that differs by more than `DEEP_TOLERANCE`, relative. Raises UserError at another teacher or
    resolution.
    """
    spec = open_set(folder)
    if spec.revision != teacher.revision:
        raise UserError(
            f"{folder} was made by teacher {spec.teacher!r} (weights {spec.revision}), --teacher is {teacher.name!r} "
            f"(weights {teacher.revision}); name the one the set was made by, with the --teacher-lora, "
            "--teacher-config and --vae that it had"
        )
    if tuple(spec.latent_shape) != teacher.latent_shape:
        raise UserError(
            f"{folder} has latents of {tuple(spec.latent_shape)}, the teacher's are {teacher.latent_shape}; give the "
            "--resolution that the set was made at"
        )
    there = [i for shard in present_shards(folder, spec) for i in spec.shard_indices(shard)]
    chosen = np.random.default_rng(seed).permutation(there)[:count]
    problems = []
    with Bar("solved anew", len(chosen)) as bar:
        for index in sorted(chosen.tolist()):
            problems += _differs(folder, teacher, spec, index)
            bar.advance(1)
    return problems


def _differs(folder: Location, teacher: Teacher, spec: PairsSpec, index: int) -> list[str]:
    shard = index // spec.shard_size
    pair = read_shard(folder, shard, spec=spec).rows([index - spec.shard_indices(shard).start])
    anew = solver(teacher, lambda _: pair.prompts, spec)(range(index, index + 1))
    error = float((anew.latents - pair.latents).norm() / anew.latents.norm())
    if error <= DEEP_TOLERANCE:  # not NaN either
        return []
    return [
        f"{folder}/{shard_name(shard)}: pair {index} is not what the teacher makes of it (off by {error:.2%})"
    ]
