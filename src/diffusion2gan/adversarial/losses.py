"""The players' losses (Kang et al. 2024, section 3.3): pure functions, their randomness an argument.

`logits` are a discriminator's answer: a sequence of maps [B, 1, h, w], one a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion2gan.teacher.conditioning import Conditioning

Logits = Sequence[Tensor]


def discriminator_loss(real: Logits, fake: Logits) -> Tensor:
    """softplus(−D(real)) + softplus(D(fake)), the mean over heads (Goodfellow et al. 2014, eq. 1). A scalar."""
    return _over_heads([-x for x in real]) + _over_heads(fake)


def student_loss(fake: Logits) -> Tensor:
    """softplus(−D(fake)), the mean over heads: the non-saturating form (the same, section 3). A scalar."""
    return _over_heads([-x for x in fake])


def _over_heads(logits: Logits) -> Tensor:
    return torch.stack([F.softplus(x.float()).mean() for x in logits]).mean()


def r1_penalty(
    discriminator: Callable[[Tensor, Conditioning, Tensor], Logits],
    noise: Tensor,
    cond: Conditioning,
    latents: Tensor,
) -> Tensor:
    """‖∇_x ΣD(z, c, x)‖² at real `latents`, Σ over all heads and places, the mean over samples (Mescheder et al. 2018).

    A scalar, differentiable in D's weights; γ/2 and the interval are the caller's. Both derivatives are exact, and
    nothing runs in reduced precision. Where D recomputes its activations, call `backward` under `plain_attention` too.
    """
    x = latents.detach().clone().requires_grad_(True)
    with torch.autocast(x.device.type, enabled=False), plain_attention():
        total = torch.stack([logits.sum() for logits in discriminator(noise, cond, x)]).sum()
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def plain_attention() -> AbstractContextManager[None]:
    """Attention by its formula: fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def mix_and_match(
    fake: Tensor, real: Tensor, prompts: Sequence[str], share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Puts other pairs' real latents in the place of a `share` of the fakes, whose noise and prompt stay.

    fake, real [B, C, h, w]. Returns the new fakes and which were replaced, [B] bool. The number is share·B, rounded
    up or down at random so that it is right on average. A row's donor is any pair of another prompt, so that what is
    labelled fake never fits its prompt; a row without one stays as it is.
    """
    other = torch.tensor(
        [[a != b for b in prompts] for a in prompts]
    )  # [B, B]: may column lend to row?
    able = other.any(1).nonzero().flatten()
    wanted = int(share * len(prompts) + torch.rand((), generator=generator).item())
    rows = able[torch.randperm(len(able), generator=generator)][:wanted]
    mixed = torch.zeros(len(prompts), dtype=torch.bool)
    mixed[rows] = True
    if len(rows) == 0:
        return fake, mixed
    donors = torch.multinomial(other[rows].float(), 1, generator=generator).flatten()
    replaced = fake.clone()
    replaced[rows.to(fake.device)] = real[donors.to(real.device)].to(fake.dtype)
    return replaced, mixed
