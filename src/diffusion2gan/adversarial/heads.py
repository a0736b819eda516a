"""Layers of the discriminators: heads, and inputs that are initialised to zero."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList

HEAD_WIDTH = 64


def head(channels: int, groups: int, spectral_norm: bool) -> nn.Sequential:
    """[B, C, h, w] → logits [B, 1, h, w].

    It begins with a norm, because features inside a network are not normalised.
    """
    return nn.Sequential(
        nn.GroupNorm(groups, channels),
        conv(channels, HEAD_WIDTH, 3, 1, spectral_norm),
        nn.SiLU(),
        conv(HEAD_WIDTH, 1, 1, 1, spectral_norm),
    )


def conv(
    channels: int, out_channels: int, size: int, stride: int, spectral_norm: bool
) -> nn.Module:
    """A padded convolution, with spectral norm (Miyato et al. 2018) if `spectral_norm`."""
    layer = nn.Conv2d(channels, out_channels, size, stride, padding=size // 2)
    if spectral_norm:
        return parametrizations.spectral_norm(layer)
    return layer


def set_spectral_norm_update(network: nn.Module, enabled: bool) -> None:
    """Turns on or off the power iteration by which a forward pass updates the spectral norms.

    torch runs it on every pass in train mode. One pass per optimiser update is enough; then an
    update in micro-batches or on several ranks equals one of the full batch.
    """
    for module in network.modules():
        if isinstance(module, ParametrizationList):
            module.train(enabled)


def zero_conv(
    channels: int, out_channels: int, size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Conv2d:
    """A convolution initialised to zero (Zhang et al. 2023, ControlNet, section 3.1)."""
    layer = nn.Conv2d(channels, out_channels, size, stride, padding)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
