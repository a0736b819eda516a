"""Checks before a run starts: do ranks, teacher, pairs and recipe fit together?"""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from diffusion2gan.distill.run import load_recipe_teacher
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.progress import console
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.pipeline import Teacher

NUM_CHECKED_PROMPTS = 16


def check_ranks(recipe: Recipe, world_size: int) -> None:
    """Raises UserError if the batch cannot be divided evenly over ranks and micro-batches.

    Also if strategy=fsdp is not possible.
    """
    # fsdp
    if recipe.strategy == "fsdp" and world_size == 1:
        raise UserError(
            "strategy=fsdp shards student and discriminator over several ranks, and this is one "
            "process. Start it under torchrun --nproc-per-node N, or set strategy=ddp (to resume a "
            "run, also pass --allow-change strategy)."
        )
    if recipe.strategy == "fsdp" and recipe.optimizer != "adamw":
        raise UserError(
            f"strategy=fsdp with optimizer={recipe.optimizer}: 8-bit optimiser states cannot be "
            "sharded. Set optimizer=adamw, or strategy=ddp."
        )

    # Even shares of the batch
    micro_batch_size = recipe.batch_size // recipe.gradient_accumulation_steps
    if micro_batch_size % world_size:
        possible = []
        for count in range(1, micro_batch_size + 1):
            if micro_batch_size % count == 0:
                possible.append(str(count))
        raise UserError(
            f"batch_size {recipe.batch_size} with gradient_accumulation_steps = "
            f"{recipe.gradient_accumulation_steps} cannot be divided over {world_size} ranks. "
            f"Possible numbers of ranks: {', '.join(possible)}; or start a new run with another "
            "batch_size or gradient_accumulation_steps."
        )


def load_pairs_teacher(
    recipe: Recipe, device: torch.device, spec: PairsSpec, folder: Location
) -> Teacher:
    """The recipe's teacher, checked against the pairs (`check_pairs`).

    Raises UserError if there is no such teacher; the message names the one of the pairs.
    """
    try:
        teacher = load_recipe_teacher(recipe, device)
    except UserError as error:
        names = (recipe.teacher, Path(recipe.teacher).name)
        if spec.teacher in names:
            raise
        raise UserError(
            f"{error} The pairs in {folder} were made by teacher {spec.teacher!r}: to distil it, "
            f"add {teacher_option(spec.teacher)}."
        ) from error
    check_pairs(spec, teacher, folder)
    return teacher


def teacher_option(name: str) -> str:
    """The option of `distill` that sets the teacher with this name, in a description of pairs.

    Only the last part of a folder's path is in it; the option is complete if that is here.
    """
    if name == "pocket" or "/" in name or Path(name).exists():
        return f"--set teacher={shlex.quote(name)}"
    return f"--set teacher=PATH, the path of {name!r}"


def check_pairs(spec: PairsSpec, teacher: Teacher, folder: Location) -> None:
    """Raises UserError if the pairs were made by another teacher, or at another resolution."""
    if spec.revision != teacher.revision:
        if spec.teacher == teacher.name:
            remedy = (
                "The name is the same, but not the weights: give distill the settings that the "
                "pairs were made with (--set teacher_lora=…, vae=…, teacher_config=…), or restore "
                "the weights"
            )
        else:
            remedy = f"To distil the teacher of the pairs, add {teacher_option(spec.teacher)}"
        arguments = "pocket"
        if teacher.name != "pocket":
            arguments = f"{shlex.quote(str(teacher.folder or teacher.name))} --prompts FILE"
        raise UserError(
            f"the pairs in {folder} were made by teacher {spec.teacher!r} (weights "
            f"{spec.revision}), but the recipe's teacher is {teacher.name!r} (weights "
            f"{teacher.revision}). {remedy}; to make pairs of the recipe's teacher: diffusion2gan "
            f"pairs --teacher {arguments} --out NEW_FOLDER"
        )
    if tuple(spec.latent_shape) != teacher.latent_shape:
        _, height, width = spec.latent_shape
        remedy = "make pairs at this resolution"
        if height == width:
            remedy += f", or set resolution={height * teacher.spatial_factor}, that of the pairs"
        raise UserError(
            f"the pairs in {folder} have latents of shape {tuple(spec.latent_shape)}, the "
            f"teacher's have {teacher.latent_shape}; {remedy}."
        )


def check_discriminator(
    recipe: Recipe, teacher: Teacher, reader: PairReader, folder: Location
) -> None:
    """Checks the discriminator's settings against the teacher and the pairs.

    Raises UserError if its timestep does not exist, or if it reads prompts and the first pairs have
    none. Warns if some of them have none, and if the run ends before the GAN loss begins.
    """
    if recipe.adversarial_weight == 0:
        return

    # Timestep
    if recipe.discriminator_timestep > teacher.last_timestep:
        raise UserError(
            f"discriminator_timestep = {recipe.discriminator_timestep} is too large: the teacher's "
            f"timesteps are 0 to {teacher.last_timestep}. The discriminator's latents are clean, "
            "so 0 is the natural choice."
        )

    # Length of the run
    gan_loss_start = recipe.gan_start_pairs + recipe.discriminator_warmup
    if gan_loss_start >= recipe.total_pairs:
        console.print(
            f"warning: the GAN loss would begin at pair {gan_loss_start} (gan_start_pairs "
            f"{recipe.gan_start_pairs} + discriminator_warmup {recipe.discriminator_warmup}), but "
            f"the run ends at total_pairs = {recipe.total_pairs}: the student is trained by "
            "regression alone. Lower them, or set adversarial_weight=0.",
            soft_wrap=True,
        )

    # Prompts
    if recipe.discriminator == "patch":
        return
    prompts = reader.first(NUM_CHECKED_PROMPTS).prompts
    num_empty = sum(not prompt.strip() for prompt in prompts)
    if num_empty == len(prompts):
        raise UserError(
            f"the pairs in {folder} have no prompts, and the discriminator reads them. Make pairs "
            "with prompts, or set adversarial_weight=0."
        )
    if num_empty > 0:
        console.print(
            f"warning: {num_empty} of the first {len(prompts)} pairs in {folder} have no prompt, "
            "and the discriminator reads them",
            soft_wrap=True,
        )
