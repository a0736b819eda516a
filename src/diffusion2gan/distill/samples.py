"""Sample sheets: the averaged student beside the teacher, on the same noise."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from diffusion2gan.distill.run import Run
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import contact_sheet

NUM_SAMPLES = 16


@torch.no_grad()
def write_samples(run: Run, out: Path, reader: PairReader) -> None:
    """Writes out/samples/PAIRS_SEEN.png: two rows of the averaged student, two of the teacher.

    With a sharded network all ranks must call this; rank 0 decodes and writes.
    """
    is_main = run.group.ranks.is_main
    if not (is_main or run.is_sharded):
        return

    # Student
    teacher = run.teacher
    pairs = reader.first(NUM_SAMPLES)
    noise = noise_from_seeds(pairs.seed, teacher.latent_shape).to(teacher.device)
    cond = teacher.encode(pairs.prompts)
    with run.ema_weights():
        latents = run.student(noise, cond)
    if not is_main:
        return

    # Sheet
    student_images = teacher.decode(latents)
    teacher_images = teacher.decode(pairs.latents.to(teacher.device))
    images = torch.cat([student_images, teacher_images])
    sheet: Image.Image = contact_sheet(images, columns=len(pairs) // 2)
    write_image(out / "samples" / f"{run.pairs_seen:09d}.png", sheet.save)
