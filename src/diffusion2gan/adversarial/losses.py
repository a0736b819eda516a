"""The losses of discriminator and student (Kang et al. 2024, section 3.3).

They are pure functions; randomness is an argument. `logits` are the output of a discriminator: a
sequence of maps [B, 1, h, w], one per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion2gan.runtime.precision import full_float32
from diffusion2gan.runtime.transfer import to_device
from diffusion2gan.teacher.conditioning import Conditioning

Logits = Sequence[Tensor]

# Length of a finite difference, in units of the latents, whose standard deviation is about 1
R1_STEP = 0.01


def discriminator_loss(real: Logits, fake: Logits) -> Tensor:
    """softplus(−D(real)) + softplus(D(fake)), averaged over heads: a scalar.

    Goodfellow et al. 2014, eq. 1, with logits.
    """
    negated = [-logits for logits in real]
    return mean_softplus(negated) + mean_softplus(fake)


def student_loss(fake: Logits) -> Tensor:
    """softplus(−D(fake)), averaged over heads: a scalar.

    The non-saturating loss of Goodfellow et al. 2014, section 3.
    """
    return mean_softplus([-logits for logits in fake])


def mean_softplus(logits: Logits) -> Tensor:
    """mean softplus(D): all heads have the same weight, regardless of map size. In float32."""
    heads = [F.softplus(head.float()).mean() for head in logits]
    return torch.stack(heads).mean()


def r1_penalty(
    discriminator: Callable[[Tensor, Conditioning, Tensor], Logits],
    noise: Tensor,
    cond: Conditioning,
    latents: Tensor,
) -> Tensor:
    """‖∇_x ΣD(z, c, x)‖² at real `latents` x, averaged over samples (Mescheder et al. 2018).

    Σ is over all logits of all heads. A scalar, differentiable in D's weights; the caller
    multiplies it by γ/2 and by the interval. Both derivatives are exact, and nothing runs in
    reduced precision. Call `backward` inside `exact_derivatives` too: it has the second derivative,
    and with gradient checkpointing repeats the forward pass.
    """
    x = latents.detach().clone().requires_grad_(True)
    with exact_derivatives(x.device.type):
        head_sums = [logits.sum() for logits in discriminator(noise, cond, x)]
        total = torch.stack(head_sums).sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    squared_norms = gradient.square().sum((1, 2, 3))
    return squared_norms.mean()


def finite_difference_r1(
    discriminator: Callable[[Tensor, Conditioning, Tensor], Logits],
    noise: Tensor,
    cond: Conditioning,
    latents: Tensor,
    direction: Tensor,
) -> Tensor:
    """An estimate of `r1_penalty` from two forward passes, without a second derivative.

    The square of the derivative along `direction` u [B, C, h, w], by a central difference:

        ((ΣD(x + s·u) − ΣD(x − s·u)) / 2s)², averaged over samples, with s = R1_STEP

    For u ~ N(0, I) its mean is ‖∇_x ΣD‖² up to O(s²), and its standard deviation √2 times the mean.
    Memory is that of an ordinary update on two samples, and fused attention and gradient
    checkpointing work. A scalar, differentiable in D's weights, in float32.
    """
    x = latents.detach()
    both = torch.cat([x + R1_STEP * direction, x - R1_STEP * direction])
    with full_float32(x.device.type):
        logits = discriminator(torch.cat([noise, noise]), Conditioning.concat(cond, cond), both)
        sums = torch.stack([head.flatten(1).sum(1) for head in logits]).sum(0)  # [2B]
    plus, minus = sums.chunk(2)
    return ((plus - minus) / (2 * R1_STEP)).square().mean()


@contextmanager
def exact_derivatives(device_type: str) -> Iterator[None]:
    """Float32 without TF32, and attention as plain matrix products.

    Fused attention kernels have no second derivative.
    """
    with full_float32(device_type), sdpa_kernel(SDPBackend.MATH):
        yield


def mix_and_match(
    fake: Tensor, real: Tensor, prompts: Sequence[str], share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replaces a `share` of the fakes by real latents of other pairs; noise and prompt are kept.

    fake, real [B, C, h, w]. Returns the new fakes and which ones were replaced, [B] bool on the
    CPU. Their number is share·B, randomly rounded up or down so that its mean is share·B. The donor
    of a row is any pair with a different prompt, so that latents labelled fake never match their
    prompt; a row without a donor is not replaced.
    """
    # Choose the rows to replace: if all prompts are equal, no row has a donor
    prompt_ids = {prompt: number for number, prompt in enumerate(prompts)}
    batch_size = len(prompts)
    num_replaceable = batch_size if len(prompt_ids) > 1 else 0
    rounding = torch.rand((), generator=generator).item()
    count = int(share * batch_size + rounding)
    rows = torch.randperm(num_replaceable, generator=generator)[:count]
    is_mixed = torch.zeros(batch_size, dtype=torch.bool)
    is_mixed[rows] = True
    if len(rows) == 0:
        return fake, is_mixed

    # Draw a donor for each of them: weights[i, j] is 1 if pair j may replace the fake of rows[i]
    ids = torch.tensor([prompt_ids[prompt] for prompt in prompts])
    weights = (ids[rows, None] != ids[None, :]).float()
    donors = torch.multinomial(weights, 1, generator=generator).flatten()

    # Replace
    donated = real[to_device(donors, real.device)]
    mixed = fake.clone()
    mixed[to_device(rows, fake.device)] = donated.to(fake.dtype)
    return mixed, is_mixed
