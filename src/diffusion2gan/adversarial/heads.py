"""Layers that every discriminator is made of: heads, and inputs that are born zero."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as normalised
from torch.nn.utils.parametrize import ParametrizationList

HEAD_WIDTH = 64


def head(channels: int, groups: int, spectral_norm: bool) -> nn.Sequential:
    """[B, C, h, w] → logits [B, 1, h, w]. The norm comes first because a network's own features have none."""
    return nn.Sequential(
        nn.GroupNorm(groups, channels),
        conv(channels, HEAD_WIDTH, 3, 1, spectral_norm),
        nn.SiLU(),
        conv(HEAD_WIDTH, 1, 1, 1, spectral_norm),
    )


def conv(
    channels: int, out_channels: int, size: int, stride: int, spectral_norm: bool
) -> nn.Module:
    layer = nn.Conv2d(channels, out_channels, size, stride, padding=size // 2)
    return normalised(layer) if spectral_norm else layer


def set_spectral_norm_update(network: nn.Module, moving: bool) -> None:
    """Whether a forward pass moves the spectral norms' estimates on, as torch's do in train mode.

    One pass an update may: an update in parts, or on several ranks, is then the same as whole.
    """
    for module in network.modules():
        if isinstance(module, ParametrizationList):
            module.train(moving)


def zero_conv(
    channels: int, out_channels: int, size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Conv2d:
    """A convolution that answers zero until it is trained (Zhang et al. 2023, ControlNet, section 3.1)."""
    layer = nn.Conv2d(channels, out_channels, size, stride, padding)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
