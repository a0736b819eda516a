"""Diffusion2GAN turns any diffusers text-to-image pipeline into a one-step generator."""

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

_MODULES = {
    "DiffusionDiscriminator": "diffusion2gan.adversarial.discriminator",
    "ELatentLPIPS": "diffusion2gan.perceptual.distance",
    "LatentLPIPS": "diffusion2gan.perceptual.distance",
    "PixelLPIPS": "diffusion2gan.perceptual.distance",
    "Recipe": "diffusion2gan.recipe",
    "Strengths": "diffusion2gan.perceptual.augment",
    "load_teacher": "diffusion2gan.teacher.loading",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so importing the package does not import torch."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'diffusion2gan' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also lists the public names that are not imported yet."""
    return sorted({*globals(), *__all__})
