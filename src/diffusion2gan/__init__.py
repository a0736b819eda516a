"""Diffusion2GAN turns any diffusers text-to-image pipeline into a one-step generator."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion2gan.adversarial.discriminator import DiffusionDiscriminator
    from diffusion2gan.api import compare, distill, evaluate, export, load_teacher, make_pairs
    from diffusion2gan.perceptual.augment import Strengths
    from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, PixelLPIPS
    from diffusion2gan.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "DiffusionDiscriminator",
    "ELatentLPIPS",
    "LatentLPIPS",
    "PixelLPIPS",
    "Recipe",
    "Strengths",
    "compare",
    "distill",
    "evaluate",
    "export",
    "load_teacher",
    "make_pairs",
]

_MODULES = {
    "DiffusionDiscriminator": "diffusion2gan.adversarial.discriminator",
    "ELatentLPIPS": "diffusion2gan.perceptual.distance",
    "LatentLPIPS": "diffusion2gan.perceptual.distance",
    "PixelLPIPS": "diffusion2gan.perceptual.distance",
    "Recipe": "diffusion2gan.recipe",
    "Strengths": "diffusion2gan.perceptual.augment",
    "load_teacher": "diffusion2gan.api",
    "make_pairs": "diffusion2gan.api",
}
# Functions that have the name of a module: the module itself is called (`callable_module`)
_CALLABLE_MODULES = ("compare", "distill", "evaluate", "export")


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so importing the package does not import torch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name in _CALLABLE_MODULES:
        return import_module(f"diffusion2gan.{name}")
    raise AttributeError(f"module 'diffusion2gan' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also lists the public names that are not imported yet."""
    return sorted({*globals(), *__all__})
