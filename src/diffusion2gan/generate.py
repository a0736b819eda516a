"""`diffusion2gan generate`: writes one image file with a grid of generated images."""

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
    """Writes one row per prompt, with `per_prompt` images each from seeds seed, seed+1, ….

    Under torchrun the ranks share the rows, and rank 0 writes the same file that a single process
    would write. Returns seconds per image.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: the file's name must end with one of {', '.join(SUFFIXES)}")
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; give each --prompt a text")
    warn_truncated(system.tokenizer, prompts, system.num_tokens)

    # Noise, the same for every row
    noise = noise_from_seeds([seed + i for i in range(per_prompt)], system.latent_shape)
    system.generate(prompts[:1], noise[:1])  # warm up

    # Generate one row per rank at a time
    num_images = len(prompts) * per_prompt
    rows: list[torch.Tensor] = []
    with connect_ranks(torch.device("cpu")) as group, Bar("generate", num_images) as bar:
        start = time.perf_counter()
        for first in range(0, len(prompts), group.ranks.world_size):
            # One row per rank. In the last round some ranks may have none, and send a blank one.
            index = first + group.ranks.rank
            if index < len(prompts):
                row = system.generate([prompts[index]] * per_prompt, noise)
            else:
                row = np.zeros((per_prompt, *system.image_size, 3), np.uint8)

            # Collect the rows of this round, without the blank ones
            gathered = group.all_gather(torch.from_numpy(row))
            rows += gathered[: len(prompts) - first]
            bar.reach(len(rows) * per_prompt)
        seconds = (time.perf_counter() - start) / num_images

    # Write the grid
    if group.ranks.is_main:
        images = from_uint8(torch.cat(rows).numpy())
        sheet = contact_sheet(images, columns=per_prompt)
        write_image(out, sheet.save)
    return seconds
