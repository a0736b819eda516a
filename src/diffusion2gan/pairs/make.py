"""`diffusion2gan pairs`: noise → latents by the teacher's ODE, shard by shard. Run it again to continue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion2gan.errors import UserError
from diffusion2gan.pairs.store import (
    Pairs,
    PairsSpec,
    noise_of,
    pair_seed,
    present_shards,
    start_set,
    write_shard,
)
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.ode import solve_ode
from diffusion2gan.teacher.pipeline import Conditioning, Teacher

PromptsOf = Callable[[Sequence[int]], list[str]]


def read_prompts(path: Path) -> list[str]:
    """One prompt a line. Raises UserError where the file is missing, empty, not UTF-8 or has blank lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"no prompts file {path}; give a text file with one prompt a line, or `pocket`") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty; write one prompt a line")
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        shown = ", ".join(map(str, blank[:5]))
        raise UserError(f"{path} has {len(blank)} blank lines (line {shown}); delete them, or write the prompts there")
    return [line.strip() for line in lines]


def prompts_digest(prompts: Sequence[str]) -> str:
    """Names a list of prompts by its content: what a set was made from, whatever the file was called."""
    return f"{len(prompts)} prompts, sha256 {hashlib.sha256(chr(10).join(prompts).encode()).hexdigest()[:16]}"


def make_pairs(teacher: Teacher, prompts_of: PromptsOf, spec: PairsSpec, folder: Path, batch_size: int = 64) -> None:
    """Solves the ODE of every pair whose shard is not there yet. A pair does not depend on `batch_size`."""
    start_set(folder, spec)
    there = present_shards(folder, spec)
    done = sum(len(spec.shard_indices(shard)) for shard in there)
    uncond = teacher.unconditional()
    with Bar("pairs", spec.count, done) as bar:
        for shard in range(spec.num_shards):
            if shard in there:
                continue
            batches = []
            indices = spec.shard_indices(shard)
            for start in range(indices.start, indices.stop, batch_size):
                batch = range(start, min(start + batch_size, indices.stop))
                batches.append(solve_batch(teacher, prompts_of, spec, batch, uncond))
                bar.advance(len(batches[-1]))
            pairs = Pairs.concat(batches)
            write_shard(
                folder, shard, spec, pairs, noise_of(pairs.seed, spec.latent_shape) if spec.keep_noise else None
            )


def solve_batch(
    teacher: Teacher, prompts_of: PromptsOf, spec: PairsSpec, indices: range, uncond: Conditioning
) -> Pairs:
    """The pairs `indices` of a set, solved together."""
    seeds = [pair_seed(spec.seed, i) for i in indices]
    prompts = prompts_of(indices)
    noise = noise_of(seeds, spec.latent_shape).to(teacher.device)
    without = uncond.expand(len(indices))
    latents = solve_ode(teacher, noise, teacher.encode(prompts), without, spec.num_inference_steps, spec.guidance_scale)
    return Pairs(list(indices), seeds, prompts, latents.cpu())
