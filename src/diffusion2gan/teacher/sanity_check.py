"""Whether a teacher's output is read as what it was trained to say: ε, v and flows mixed up make noise, silently."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion2gan.runtime.progress import console
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher

LARGEST_STD, LARGEST_CORRELATION = (
    3.0,
    0.5,
)  # of x0 at T: a mean of latents, whose own std is about 1; judgement


@torch.no_grad()
def warn_if_implausible(teacher: Teacher, noise: Tensor, cond: Conditioning) -> bool:
    """Looks at x0 at the last timestep, from `noise` [B, C, h, w]; says if it looks wrong, and returns whether it did.

    There the network knows next to nothing of the picture, so x0 is an average of many: small, and unlike the noise. v
    taken for ε comes out 14.6 times too large; ε taken for v, or an untrained flow, is the noise itself.
    """
    x0 = teacher.denoise(noise, teacher.last_timestep, cond)
    std = float(x0.std())
    correlation = float(torch.corrcoef(torch.stack([x0.flatten(), noise.flatten()]))[0, 1])
    if std <= LARGEST_STD and abs(correlation) <= LARGEST_CORRELATION:
        return False
    console.print(
        f"warning: what {teacher.name} makes of pure noise looks wrong: standard deviation {std:.3g} (about 1 or less "
        f"is usual), correlation with the noise {correlation:.2f} (about 0 is usual). It is read as "
        f"{teacher.prediction_type}; if the model was trained to predict something else, set prediction_type in its "
        "scheduler/scheduler_config.json and make the pairs anew.",
        soft_wrap=True,
    )
    return True
