"""What must fit together before a run starts: device, ranks, teacher, pairs."""

from __future__ import annotations

from diffusion2gan.errors import UserError
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.progress import console
from diffusion2gan.runtime.storage import Location
from diffusion2gan.teacher.pipeline import Teacher

LOOKED_AT = 16  # pairs whose prompts are looked at


def check_ranks(recipe: Recipe, world: int) -> None:
    """Raises UserError where the batch cannot be cut evenly over the ranks and their parts, or fsdp cannot be."""
    if recipe.strategy == "fsdp" and world == 1:
        raise UserError(
            "strategy=fsdp cuts both players over several ranks, and this is one process. Start it under torchrun "
            "--nproc-per-node N, or set strategy=ddp (to go on with a run: and --allow-change strategy)."
        )
    if recipe.strategy == "fsdp" and recipe.optimizer != "adamw":
        raise UserError(
            f"strategy=fsdp with optimizer={recipe.optimizer}: averages of 8 bits are not cut over ranks. Set "
            "optimizer=adamw, or strategy=ddp."
        )
    share = recipe.batch_size // recipe.gradient_accumulation_steps
    if share % world:
        fit = [str(n) for n in range(1, share + 1) if share % n == 0]
        raise UserError(
            f"batch_size {recipe.batch_size} in gradient_accumulation_steps = {recipe.gradient_accumulation_steps} parts a rank cannot be cut over "
            f"{world} ranks. Numbers of ranks that would do: {', '.join(fit)}; or change batch_size or gradient_accumulation_steps in a "
            "new run."
        )


def check_pairs(spec: PairsSpec, teacher: Teacher, folder: Location) -> None:
    """Raises UserError where the pairs are another teacher's or another resolution's."""
    if spec.revision != teacher.revision:
        raise UserError(
            f"the pairs in {folder} were made by teacher {spec.teacher!r} (weights {spec.revision}), the recipe's is "
            f"{teacher.name!r} (weights {teacher.revision}). Make pairs with this teacher, or set teacher=… to theirs."
        )
    if tuple(spec.latent_shape) != teacher.latent_shape:
        raise UserError(
            f"the pairs in {folder} have latents of {tuple(spec.latent_shape)}, the teacher's are "
            f"{teacher.latent_shape}; make pairs at this resolution."
        )


def check_discriminator(
    recipe: Recipe, teacher: Teacher, reader: PairReader, folder: Location
) -> None:
    """Raises UserError where a discriminator shall read prompts and the first pairs have none, or its timestep is none.

    Says where some have none, and where the run ends before the student meets the discriminator.
    """
    if recipe.adversarial_weight == 0:
        return
    if recipe.discriminator_timestep > teacher.last_timestep:
        raise UserError(
            f"discriminator_timestep = {recipe.discriminator_timestep}, and the teacher's are 0 to "
            f"{teacher.last_timestep}; its latents are clean, 0 is the natural choice."
        )
    felt_from = recipe.gan_start_pairs + recipe.discriminator_warmup
    if felt_from >= recipe.total_pairs:
        console.print(
            f"warning: the student would feel the discriminator from pair {felt_from} on (gan_start_pairs "
            f"{recipe.gan_start_pairs} + discriminator_warmup {recipe.discriminator_warmup}), and the run ends at "
            f"total_pairs = {recipe.total_pairs}: this is regression alone. Lower them, or set adversarial_weight=0.",
            soft_wrap=True,
        )
    prompts = reader.first(LOOKED_AT).prompts
    blank = sum(not prompt.strip() for prompt in prompts)
    if recipe.discriminator == "patch" or blank == 0:
        return
    if blank < len(prompts):
        console.print(
            f"warning: {blank} of the first {len(prompts)} pairs in {folder} have no prompt, which the discriminator "
            "reads",
            soft_wrap=True,
        )
    else:
        raise UserError(
            f"the pairs in {folder} have no prompts, and the discriminator is to read them. Make pairs with prompts, "
            "or set adversarial_weight=0."
        )
