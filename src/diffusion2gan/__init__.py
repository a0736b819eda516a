"""Diffusion2GAN: any diffusers text-to-image pipeline becomes a one-step generator."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "DiffusionDiscriminator",
    "ELatentLPIPS",
    "LatentLPIPS",
    "PixelLPIPS",
    "Recipe",
    "Strengths",
    "load_teacher",
]

_HOMES = {
    "DiffusionDiscriminator": "diffusion2gan.adversarial.discriminator",
    "ELatentLPIPS": "diffusion2gan.perceptual.distance",
    "LatentLPIPS": "diffusion2gan.perceptual.distance",
    "PixelLPIPS": "diffusion2gan.perceptual.distance",
    "Recipe": "diffusion2gan.recipe",
    "Strengths": "diffusion2gan.perceptual.augment",
    "load_teacher": "diffusion2gan.teacher.loading",
}


def __getattr__(name: str) -> Any:
    """Loads the public names when they are asked for: importing the package does not import torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffusion2gan' has no attribute {name!r}")
