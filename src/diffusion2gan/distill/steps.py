"""The two updates of Diffusion2GAN (Kang et al. 2024, section 3): discriminator, then student.

Both use the same pairs. All randomness is a function of (seed, pairs seen), so that a resumed run
repeats it. Both updates work through a batch in micro-batches; each loss is weighted by its
micro-batch's share of the batch, so the update does not depend on how the batch was divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion2gan.adversarial.heads import set_spectral_norm_update
from diffusion2gan.adversarial.losses import (
    discriminator_loss,
    exact_derivatives,
    finite_difference_r1,
    mix_and_match,
    r1_penalty,
    student_loss,
)
from diffusion2gan.distill.batches import HostBatch, prepare
from diffusion2gan.distill.health import discriminator_metrics, latent_statistics
from diffusion2gan.distill.losses import Distance
from diffusion2gan.distill.metrics import StepMetrics
from diffusion2gan.distill.run import Run
from diffusion2gan.pairs.store import Pairs
from diffusion2gan.perceptual.augment import BatchRows
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import fsdp
from diffusion2gan.runtime.distributed import Flags
from diffusion2gan.runtime.precision import full_float32
from diffusion2gan.runtime.schedule import cosine_decay
from diffusion2gan.runtime.transfer import to_device
from diffusion2gan.teacher.conditioning import Conditioning

# A step has two independent streams of random numbers
STUDENT = 0
DISCRIMINATOR = 1


def step(
    run: Run,
    batch: Pairs | HostBatch,
    distance: Distance,
    get_flags: Callable[[], Flags] = Flags,
) -> tuple[StepMetrics, Flags]:
    """Updates the discriminator, then the student, on one global batch of pairs.

    `get_flags` is called at the end of the step and returns this rank's requests. Returns the
    step's log entry, which on a GPU is best read a step later, and the requests of all ranks
    together.
    """
    batches = micro_batches(run, batch)
    discriminator_entry = {}
    outputs: list[Tensor] | None = None

    if run.discriminator is not None and run.pairs_seen >= run.recipe.gan_start_pairs:
        # One micro-batch: both updates use one forward pass of the student, whose weights are the
        # same in both. More would have to keep the activations of all.
        if len(batches) == 1:
            run.group.unshard(run.student.trained, run.discriminator)
            with run.autocast():
                outputs = [run.student(batches[0].noise, batches[0].cond)]
        discriminator_entry = discriminator_step(run, batches, outputs)
    student_entry, flags = student_step(run, batches, distance, get_flags, outputs)

    run.pairs_seen += len(batches[0].pairs)
    entry = {"pairs_seen": run.pairs_seen, **discriminator_entry, **student_entry}
    return StepMetrics(entry), flags


def discriminator_step(
    run: Run, batches: Sequence[MicroBatch], outputs: Sequence[Tensor] | None = None
) -> dict[str, Any]:
    """One update of D on softplus(−D(real)) + softplus(D(fake)), and R1 every `r1_every` steps.

    Some of the fakes are mismatched (mix-and-match). `outputs`: the student's latents per
    micro-batch, if they are computed already. Returns the step's log entry, for `StepMetrics`.
    """
    recipe = run.recipe
    discriminator = run.discriminator
    optimizer = run.discriminator_optimizer
    assert discriminator is not None and optimizer is not None

    # Prepare the random numbers and the networks
    seed = step_seed(recipe.seed, run.pairs_seen, DISCRIMINATOR)
    generator = torch.Generator("cpu").manual_seed(seed)
    run.group.unshard(run.student.trained, discriminator)
    optimizer.zero_grad(set_to_none=True)

    # 1. Fakes, without gradient
    fake, mixed = make_fakes(run, batches, generator, outputs)

    # 2. GAN loss: real and fake latents in one forward pass, with the same noise and prompts
    gan_loss = torch.zeros((), device=fake.device)
    real_logits: list[list[Tensor]] = []
    fake_logits: list[list[Tensor]] = []
    for batch in batches:
        # Spectral norms take one power iteration per update, whatever the number of micro-batches
        set_spectral_norm_update(discriminator, batch is batches[0])

        # Forward
        latents = torch.cat([batch.latents, fake[batch.rows]])  # [2b, C, h, w]
        noise = torch.cat([batch.noise, batch.noise])
        cond = Conditioning.concat(batch.cond, batch.cond)
        with run.autocast():
            logits = discriminator(noise, cond, latents)

        # Loss and backward
        halves = [head.chunk(2) for head in logits]
        on_real = [real for real, _ in halves]
        on_fake = [fake for _, fake in halves]
        loss = discriminator_loss(on_real, on_fake) * batch.weight
        loss.backward()

        # For the log
        gan_loss += loss.detach()
        real_logits.append(on_real)
        fake_logits.append(on_fake)
    set_spectral_norm_update(discriminator, False)

    # 3. R1 penalty, at every `r1_every`-th step
    r1 = torch.zeros((), device=fake.device)
    with_r1 = r1_is_due(recipe, run.pairs_seen)
    if with_r1:
        r1 = r1_step(run, batches, generator)

    # 4. Sum over the ranks: gradients, losses, logits
    real = scatter_heads(batches, real_logits)
    fakes = scatter_heads(batches, fake_logits)
    (gan_loss, r1, *heads), _ = run.group.sum(discriminator, [gan_loss, r1, *real, *fakes])
    num_heads = len(real)
    real = heads[:num_heads]
    fakes = heads[num_heads:]

    # 5. Update: D's learning rate follows the student's schedule
    student_rate = learning_rate(recipe, run.pairs_seen)
    rate = student_rate * recipe.discriminator_learning_rate / recipe.learning_rate
    grad_norm, _ = clip_and_step(optimizer, discriminator.parameters(), rate, recipe.max_grad_norm)

    # 6. Log entry
    entry = {"d_loss": gan_loss, "d_grad_norm": grad_norm}
    if with_r1:
        entry["r1"] = r1
    return entry | discriminator_metrics(real, fakes, mixed)


def student_step(
    run: Run,
    batches: Sequence[MicroBatch],
    distance: Distance,
    get_flags: Callable[[], Flags] = Flags,
    outputs: Sequence[Tensor] | None = None,
) -> tuple[dict[str, Any], Flags]:
    """One update of the student and of its average on distance + λ·softplus(−D), with D frozen.

    λ is zero until D has been trained on `discriminator_warmup` pairs. `outputs`: the student's
    latents per micro-batch, with their graphs, if they are computed already. Returns the step's log
    entry, for `StepMetrics`, and the requests of all ranks together.
    """
    recipe = run.recipe
    rate = learning_rate(recipe, run.pairs_seen)
    gan_weight = adversarial_weight(recipe, run.pairs_seen)
    discriminator = run.discriminator if gan_weight > 0 else None

    # Prepare the networks
    run.group.unshard(run.student.trained, discriminator)
    run.optimizer.zero_grad(set_to_none=True)

    # 1. Gradients of the regression loss and of the GAN loss
    regression_loss = torch.zeros((), device=batches[0].noise.device)
    gan_loss = torch.zeros((), device=batches[0].noise.device)
    detached = []
    with frozen(discriminator):
        for number, batch in enumerate(batches):
            # Forward
            if outputs is not None:
                latents = outputs[number]
            else:
                with run.autocast():
                    latents = run.student(batch.noise, batch.cond)  # [b, C, h, w]

            # Regression. The same seed for every micro-batch: `BatchRows` selects its transforms
            seed = step_seed(recipe.seed, run.pairs_seen)
            generator = torch.Generator("cpu").manual_seed(seed)
            distances = distance(latents, batch.latents, generator, batch.batch_rows)  # [b]
            regression = distances.mean() * batch.weight
            loss = regression

            # GAN
            if discriminator is not None:
                with run.autocast():
                    logits = discriminator(batch.noise, batch.cond, latents)
                adversarial = student_loss(logits) * batch.weight
                loss = regression + gan_weight * adversarial
                gan_loss += adversarial.detach()

            # Backward
            loss.backward()
            regression_loss += regression.detach()
            detached.append(latents.detach())

    # 2. Sum over the ranks: gradients, losses, outputs
    extras = [regression_loss, gan_loss, scatter_rows(batches, detached)]
    sums, flags = run.group.sum(run.student.trained, extras, get_flags())
    regression_loss, gan_loss, output = sums

    # 3. Update of the weights and of their average
    parameters = run.student.trained.parameters()
    grad_norm, skipped = clip_and_step(run.optimizer, parameters, rate, recipe.max_grad_norm)
    if skipped is not True:
        run.ema.update(run.student.trained, skipped)

    # 4. Log entry
    entry = {"loss": regression_loss, "grad_norm": grad_norm}
    if discriminator is not None:
        entry["gan_loss"] = gan_loss
    return entry | latent_statistics(output, batches[0].all_latents), flags


@torch.no_grad()
def make_fakes(
    run: Run,
    batches: Sequence[MicroBatch],
    generator: torch.Generator,
    outputs: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (the student's latents [B, C, h, w] with a share mismatched, which ones [B] bool).

    The mismatched rows are drawn for the global batch; rows of other ranks are zero and not used.
    `outputs`: the student's latents per micro-batch, if they are computed already.
    """
    if outputs is None:
        with run.autocast():
            outputs = [run.student(batch.noise, batch.cond) for batch in batches]
    fake = scatter_rows(batches, outputs)

    real = batches[0].all_latents
    prompts = batches[0].pairs.prompts
    return mix_and_match(fake, real, prompts, run.recipe.mix_share, generator)


def r1_step(run: Run, batches: Sequence[MicroBatch], generator: torch.Generator) -> Tensor:
    """Adds the gradient of γ/2·‖∇_x ΣD‖² × `r1_every`, at one real sample, to D's gradients.

    With r1_method = "finite_differences" it is estimated along one random direction. Returns
    ‖∇_x ΣD‖² on the rank that has the sample, zero on the others.
    """
    assert run.discriminator is not None
    row = int(torch.randint(len(batches[0].pairs), (), generator=generator))

    for batch in batches:
        if batch.rows.start <= row < batch.rows.stop:
            index = row - batch.rows.start
            sample = slice(index, index + 1)
            noise = batch.noise[sample]
            cond = batch.cond.rows(sample)
            latents = batch.latents[sample]

            factor = run.recipe.r1_weight / 2 * run.recipe.r1_every
            if run.recipe.r1_method == "finite_differences":
                direction = torch.randn(latents.shape, generator=generator)
                direction = to_device(direction, latents.device)
                penalty = finite_difference_r1(run.discriminator, noise, cond, latents, direction)
                with full_float32(latents.device.type):
                    (factor * penalty).backward()
                return penalty.detach()

            with exact_derivatives(latents.device.type):
                penalty = r1_penalty(run.discriminator, noise, cond, latents)
                loss = factor * penalty
                loss.backward()
            return penalty.detach()
    return torch.zeros((), device=batches[0].noise.device)


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Gradients pass through `module` but not into its parameters.

    The backward pass belongs inside too: gradient checkpointing repeats the forward pass in it.
    """
    if module is None:
        yield
        return
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


@dataclass(frozen=True)
class MicroBatch:
    """The rows `rows` of a global batch `pairs`, on the device: the input of one forward pass."""

    rows: slice
    pairs: Pairs
    all_latents: Tensor  # [B, C, h, w], the teacher's, of the global batch
    noise: Tensor  # [b, C, h, w]
    cond: Conditioning

    @property
    def latents(self) -> Tensor:
        """[b, C, h, w], the teacher's."""
        return self.all_latents[self.rows]

    @property
    def weight(self) -> float:
        """Its share of the global batch."""
        return len(self.noise) / len(self.pairs)

    @property
    def batch_rows(self) -> BatchRows:
        return BatchRows(self.rows, len(self.pairs))


def micro_batches(run: Run, batch: Pairs | HostBatch) -> list[MicroBatch]:
    """This rank's rows of the global batch, in `gradient_accumulation_steps` micro-batches."""
    if isinstance(batch, Pairs):
        batch = prepare(run, batch)
    teacher = run.teacher
    pairs = batch.pairs

    # One copy to the device for all micro-batches
    latents = to_device(batch.latents, teacher.device)
    all_noise = to_device(batch.noise, teacher.device)
    all_cond = None
    if batch.cond is not None:
        all_cond = batch.cond.map(lambda tensor: to_device(tensor, teacher.device))

    num_batches = run.recipe.gradient_accumulation_steps
    size = len(all_noise) // num_batches
    batches = []
    for number in range(num_batches):
        local_rows = slice(number * size, (number + 1) * size)
        rows = slice(batch.rows.start + local_rows.start, batch.rows.start + local_rows.stop)
        noise = all_noise[local_rows]
        if all_cond is not None:
            cond = all_cond.rows(local_rows)
        else:
            cond = teacher.encode(pairs.prompts[rows])
        batches.append(MicroBatch(rows, pairs, latents, noise, cond))
    return batches


def scatter_rows(batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> Tensor:
    """One tensor [b, …] per micro-batch → [B, …] float32, without graph.

    The rows of other ranks are zero.
    """
    first = values[0]
    scattered = torch.zeros(len(batches[0].pairs), *first.shape[1:], device=first.device)
    for batch, value in zip(batches, values, strict=True):
        scattered[batch.rows] = value.detach().float()
    return scattered


def scatter_heads(batches: Sequence[MicroBatch], logits: Sequence[list[Tensor]]) -> list[Tensor]:
    """The logits of each micro-batch, one tensor per head → one tensor [B, 1, h, w] per head."""
    return [scatter_rows(batches, head) for head in zip(*logits, strict=True)]


def clip_and_step(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    rate: float,
    max_grad_norm: float,
) -> tuple[Tensor, Tensor | bool]:
    """Clips the gradients and updates the parameters, with learning rate `rate`.

    A gradient that is not finite is skipped: nothing changes. Returns the norm before clipping, and
    whether the update was skipped: a tensor, 1 or 0, if the optimiser decides that on the device.
    """
    for param_group in optimizer.param_groups:
        param_group["lr"] = rate
    norm = fsdp.full_tensor(nn.utils.clip_grad_norm_(parameters, max_grad_norm))

    # A fused optimiser reads `found_inf`, and changes nothing if it is 1: the host does not wait
    if optimizer.defaults.get("fused"):
        skipped = (~norm.isfinite()).float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        return norm, skipped

    if not math.isfinite(float(norm)):
        return norm, True
    optimizer.step()
    return norm, False


def adversarial_weight(recipe: Recipe, pairs_seen: int) -> float:
    """λ at this point of the run: zero until D has been trained on `discriminator_warmup` pairs."""
    if pairs_seen < recipe.gan_start_pairs + recipe.discriminator_warmup:
        return 0.0
    return recipe.adversarial_weight


def r1_is_due(recipe: Recipe, pairs_seen: int) -> bool:
    """Whether this step has the R1 penalty: every `r1_every`-th, counted from the run's start."""
    num_steps = pairs_seen // recipe.batch_size
    return recipe.r1_weight > 0 and num_steps % recipe.r1_every == 0


def step_seed(seed: int, pairs_seen: int, stream: int = STUDENT) -> int:
    """The seed of one of a step's random streams: 32 bits, all that torch's CPU generator uses.

    It is a hash of all arguments, and differs from the seeds of the pairs' noise.
    """
    sequence = np.random.SeedSequence([seed, pairs_seen])
    return int(sequence.generate_state(stream + 1)[stream])


def learning_rate(recipe: Recipe, pairs_seen: int) -> float:
    """Linear warm-up over the first `warmup` share of the run, then a cosine to a twentieth."""
    progress = pairs_seen / recipe.total_pairs
    if progress < recipe.warmup:
        warmup_pairs = recipe.warmup * recipe.total_pairs
        return recipe.learning_rate * (pairs_seen + recipe.batch_size) / warmup_pairs

    return cosine_decay(progress, recipe.learning_rate, recipe.warmup, floor=0.05)
