"""The one-step student: the teacher's network with the teacher's weights, run once at the last timestep."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from diffusion2gan.teacher.pipeline import Conditioning, Teacher


class Student(nn.Module):
    """`student(noise, cond)` → latents [B, C, h, w] float32, differentiable in its `network`'s weights.

    x̂ = x0(z, unet(z, T, c)) with T the teacher's last timestep; the teacher's own meaning of the output (ε or v) is
    kept, in float32, so that the exported network is an ordinary one. ε at T multiplies errors by 14.6, so the output
    layer and all after it stay in float32 under autocast too.
    """

    def __init__(self, teacher: Teacher, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.network = copy.deepcopy(teacher.network).requires_grad_(True)
        self.network.conv_out = Float32Conv2d.of(self.network.conv_out)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self._teacher = (teacher,)  # in a tuple: not a part of this module

    def forward(self, noise: Tensor, cond: Conditioning) -> Tensor:
        teacher = self._teacher[0]
        return teacher.denoise(noise, teacher.last_timestep, cond, self.network)


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast does not touch."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Float32Conv2d:
        """The same layer, with the same parameters under the same names."""
        same = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]
        same.weight, same.bias = conv.weight, conv.bias
        return same

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())
