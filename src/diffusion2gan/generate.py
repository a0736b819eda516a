"""`diffusion2gan generate`: prompts → a picture, or a grid of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.systems import System
from diffusion2gan.pairs.store import noise_of
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import from_uint8, sheet
from diffusion2gan.teacher.pipeline import warn_truncated

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def generate(system: System, prompts: Sequence[str], seed: int, per_prompt: int, out: Path) -> float:
    """One row a prompt, `per_prompt` pictures each from seeds seed, seed+1, …; returns seconds per picture."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: name a picture file ({', '.join(SUFFIXES)})")
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; give --prompt some words")
    warn_truncated(system.tokenizer, prompts, system.num_tokens)
    seeds = [seed + i for i in range(per_prompt)]
    noise = noise_of(seeds, system.latent_shape)
    system.generate(prompts[:1], noise[:1])  # warm up
    start = time.perf_counter()
    rows = [from_uint8(system.generate([prompt] * per_prompt, noise)) for prompt in prompts]
    seconds = (time.perf_counter() - start) / (len(prompts) * per_prompt)
    write_image(out, sheet(torch.cat(rows), columns=per_prompt).save)
    return seconds
