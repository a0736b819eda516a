"""A check that the teacher's prediction type is right.

A network trained for v but read as ε, or the reverse, produces noise without an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion2gan.runtime.progress import console
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.pipeline import Teacher

# Limits for x0 at the last timestep. It is close to the mean of all latents, and latents have a
# standard deviation of about 1. Both values are chosen by judgement.
MAX_STD = 3.0
MAX_CORRELATION = 0.5


@torch.no_grad()
def warn_if_implausible(teacher: Teacher, noise: Tensor, cond: Conditioning) -> bool:
    """Warns if x0 from pure `noise` [B, C, h, w] is implausible. Returns whether it warned.

    At the last timestep the input contains almost no image, so x0 is an average over many images:
    small, and uncorrelated with the noise. If v is read as ε, x0 is 14.6 times too large; if ε is
    read as v, or a flow is untrained, x0 is the noise itself.
    """
    x0 = teacher.denoise(noise, teacher.last_timestep, cond)
    std = float(x0.std())
    correlation = float(torch.corrcoef(torch.stack([x0.flatten(), noise.flatten()]))[0, 1])
    if std <= MAX_STD and abs(correlation) <= MAX_CORRELATION:
        return False

    console.print(
        f"warning: the output of {teacher.name} for pure noise looks wrong: its standard deviation "
        f"is {std:.3g} (usually about 1 or less) and its correlation with the noise is "
        f"{correlation:.2f} (usually about 0). The output is read as {teacher.prediction_type}; if "
        "the model was trained to predict something else, set prediction_type in its "
        "scheduler/scheduler_config.json and make the pairs again.",
        soft_wrap=True,
    )
    return True


def count_implausible(latents: Tensor) -> int:
    """How many of the teacher's latents [B, C, h, w] are not finite, or vary more than MAX_STD.

    Their correlation with the noise is not checked: an ODE's solution may resemble its noise.
    """
    rows = latents.flatten(1).double()
    plausible = rows.isfinite().all(1) & (rows.std(1) <= MAX_STD)
    return int((~plausible).sum())
