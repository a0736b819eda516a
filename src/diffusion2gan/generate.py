"""`diffusion2gan generate`: prompts → a picture, or a grid of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime.distributed import connect_ranks
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import contact_sheet, from_uint8
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.pipeline import warn_truncated

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def generate(
    system: System, prompts: Sequence[str], seed: int, per_prompt: int, out: Path
) -> float:
    """One row a prompt, `per_prompt` pictures each from seeds seed, seed+1, …; returns seconds per picture.

    Under torchrun the ranks share the rows, and the first writes the same picture as one process would.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: name a picture file ({', '.join(SUFFIXES)})")
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; give --prompt some words")
    warn_truncated(system.tokenizer, prompts, system.num_tokens)
    noise = noise_from_seeds([seed + i for i in range(per_prompt)], system.latent_shape)
    system.generate(prompts[:1], noise[:1])  # warm up
    total, rows = len(prompts) * per_prompt, list[torch.Tensor]()
    with connect_ranks(torch.device("cpu")) as group, Bar("generate", total) as bar:
        start = time.perf_counter()
        for first in range(0, len(prompts), group.ranks.world_size):
            mine = first + group.ranks.rank  # beyond the last at the end of the last round
            blank = np.zeros((per_prompt, *system.pixels, 3), np.uint8)
            made = (
                system.generate([prompts[mine]] * per_prompt, noise)
                if mine < len(prompts)
                else blank
            )
            rows += group.all_gather(torch.from_numpy(made))[: len(prompts) - first]
            bar.reach(len(rows) * per_prompt)
        seconds = (time.perf_counter() - start) / total
    if group.ranks.is_main:
        write_image(
            out, contact_sheet(from_uint8(torch.cat(rows).numpy()), columns=per_prompt).save
        )
    return seconds
