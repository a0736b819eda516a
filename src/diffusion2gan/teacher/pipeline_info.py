"""Sizes and limits of a text-to-image pipeline, read from the configs of its components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion2gan.teacher import autoencoder
from diffusion2gan.teacher.families import FAMILIES, Family


@dataclass(frozen=True)
class PipelineInfo:
    """Latent shape, image size, tokenizer and token limit of a diffusers pipeline.

    `latent_size` is the height and width of its latents if they are not the model's default.
    Pipelines without a row in `FAMILIES` are read like Stable Diffusion.
    """

    pipeline: Any
    latent_size: tuple[int, int] | None = None

    @property
    def family(self) -> Family | None:
        return FAMILIES.get(type(self.pipeline).__name__)

    @property
    def network(self) -> Any:
        """The denoising network: a UNet or a transformer."""
        return getattr(self.pipeline, "transformer", None) or self.pipeline.unet

    @property
    def packed(self) -> int:
        """Side of the latent patch that the pipeline packs into one network input: 2 for Flux."""
        return self.family.packed if self.family else 1

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side."""
        return autoencoder.spatial_factor(self.pipeline.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        config = self.network.config
        channels = config.in_channels // self.packed**2

        size = self.latent_size or getattr(config, "sample_size", None)
        size = size or self.pipeline.default_sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (channels, height, width)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        _, height, width = self.latent_shape
        return (height * self.spatial_factor, width * self.spatial_factor)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that reads the longest part of a prompt."""
        name = self.family.tokenizer if self.family else "tokenizer"
        return getattr(self.pipeline, name) or self.pipeline.tokenizer

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a prompt that are used; the pipeline truncates longer prompts."""
        limit = int(self.tokenizer.model_max_length)
        if self.family is None or self.family.num_tokens is None:
            return limit
        return min(limit, self.family.num_tokens)
