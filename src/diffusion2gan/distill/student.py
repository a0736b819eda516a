"""The one-step student: the teacher's network with the teacher's weights, run once at the last timestep."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from diffusion2gan.teacher.pipeline import Conditioning, Teacher


class Student(nn.Module):
    """`student(noise, cond)` → latents [B, C, h, w] float32, differentiable in its `unet`'s weights.

    x̂ = x0(z, unet(z, T, c)) with T the teacher's last timestep; the teacher's own meaning of the output (ε or v) is
    kept, in float32, so that the exported UNet is an ordinary one.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.unet = copy.deepcopy(teacher.unet).requires_grad_(True)
        self._teacher = (teacher,)  # in a tuple: not a part of this module

    def forward(self, noise: Tensor, cond: Conditioning) -> Tensor:
        teacher = self._teacher[0]
        return teacher.denoise(noise, teacher.last_timestep, cond, self.unet)
