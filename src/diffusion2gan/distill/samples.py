"""Samples: the averaged student beside the teacher on the same noise; prompts of the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from diffusion2gan.distill.run import Run
from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import contact_sheet, to_pillow
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher

NUM_SAMPLES = 16  # pairs on a sheet, and images that are generated at once
MAX_PROMPTS = 64  # of the user


@dataclass(frozen=True)
class Sample:
    """The student's image of a prompt, and the teacher's from the same noise, if it is known."""

    prompt: str
    student: Image.Image
    teacher: Image.Image | None


@dataclass(frozen=True)
class PromptBatch:
    """Some prompts of the user, encoded (on the CPU), with the seeds of their noise."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    cond: Conditioning


def encode_sample_prompts(teacher: Teacher, prompts: Sequence[str]) -> list[PromptBatch]:
    """Encodes prompts of the user while the text encoders are there; the i-th has seed i.

    Raises UserError if there are too many.
    """
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"there are {len(prompts)} sample prompts, but at most {MAX_PROMPTS} are shown; use a "
            "shorter file"
        )
    batches = []
    for start in range(0, len(prompts), NUM_SAMPLES):
        batch = prompts[start : start + NUM_SAMPLES]
        seeds = range(start, start + len(batch))
        batches.append(PromptBatch(batch, seeds, teacher.encode(batch).to("cpu")))
    return batches


@torch.no_grad()
def write_samples(
    run: Run, out: Path, reader: PairReader, prompt_batches: Sequence[PromptBatch] = ()
) -> list[Sample]:
    """Writes out/samples/PAIRS_SEEN.png: two rows of the averaged student, two of the teacher.

    Also PAIRS_SEEN-prompts.png, the student's images of the user's prompts, if there are some.
    Returns all of them, the user's prompts first. With a sharded network all ranks must call this;
    rank 0 decodes and writes, and the others return nothing.
    """
    is_main = run.group.ranks.is_main
    if not (is_main or run.is_sharded):
        return []

    # Student
    teacher = run.teacher
    pairs = reader.first(NUM_SAMPLES)
    noise = noise_from_seeds(pairs.seed, teacher.latent_shape).to(teacher.device)
    cond = teacher.encode(pairs.prompts)
    of_prompts = []
    with run.ema_weights():
        latents = run.student(noise, cond)
        for batch in prompt_batches:
            noise = noise_from_seeds(batch.seeds, teacher.latent_shape).to(teacher.device)
            of_prompts.append(run.student(noise, batch.cond.to(teacher.device)))
    if not is_main:
        return []

    # Sheet of the pairs
    student_images = teacher.decode(latents)
    teacher_images = teacher.decode(pairs.latents.to(teacher.device))
    images = torch.cat([student_images, teacher_images])
    sheet: Image.Image = contact_sheet(images, columns=len(pairs) // 2)
    write_image(out / "samples" / f"{run.pairs_seen:09d}.png", sheet.save)

    # Sheet of the user's prompts
    samples = []
    decoded = [teacher.decode(latents) for latents in of_prompts]
    for batch, batch_images in zip(prompt_batches, decoded, strict=True):
        for prompt, image in zip(batch.prompts, to_pillow(batch_images), strict=True):
            samples.append(Sample(prompt, image, None))
    if decoded:
        sheet = contact_sheet(torch.cat(decoded), columns=8)
        write_image(out / "samples" / f"{run.pairs_seen:09d}-prompts.png", sheet.save)

    # The pairs' images one by one
    student_list = to_pillow(student_images)
    teacher_list = to_pillow(teacher_images)
    for prompt, student, taught in zip(pairs.prompts, student_list, teacher_list, strict=True):
        samples.append(Sample(prompt, student, taught))
    return samples
