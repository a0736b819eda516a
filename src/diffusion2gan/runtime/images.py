"""Conversion between image files, tensors in [−1, 1] and 8-bit images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion2gan.errors import Failure

# How `read_rgb` reads a file, as evaluation protocols state it
READING = (
    "turned as EXIF says; 16 bit divided by 257 and rounded; transparency over white; first frame; "
    "colour profiles ignored"
)


def read_rgb(file: Path | io.BytesIO) -> Image.Image:
    """Reads an image file as 8-bit RGB.

    It is turned as its EXIF orientation says. 16-bit grey values are divided by 257 and rounded
    (Pillow itself reads 16-bit colours that way, by their upper byte). Transparent pixels are
    composed over white. Of an animation it is the first frame. Colour profiles are ignored. Raises
    ValueError for grey values of 32 bits, whose range is not known, and Pillow's errors for
    damaged files.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F"):
            raise ValueError("its grey values have 32 bits, whose range is not known")
        if image.mode.startswith("I;16"):
            values = np.asarray(image).astype(np.float64)
            image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, rgba)
        return image.convert("RGB")


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [−1, 1] → [B, H, W, 3] uint8, rounded as diffusers does.

    Raises Failure if a value is NaN, which would become black.
    """
    if images.isnan().any():
        raise Failure(
            "an image has values that are not numbers (NaN), so it is not written. The network or "
            "the VAE overflows in its precision, or its weights are damaged."
        )
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 → [B, 3, H, W] float32 in [−1, 1], contiguous.

    A convolution's last bit depends on the order of its input in memory, which must not depend on
    where the images come from.
    """
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return channels_first.float() / 127.5 - 1


def to_pillow(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [−1, 1] → Pillow images."""
    return [Image.fromarray(array) for array in to_uint8(images)]


def contact_sheet(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """One image with all `images` [B, 3, H, W], row by row, `gap` white pixels between them."""
    arrays = to_uint8(images)
    count, height, width, _ = arrays.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)

    # An empty sheet
    column_width = width + gap
    row_height = height + gap
    sheet_size = (columns * column_width - gap, rows * row_height - gap)
    sheet = Image.new("RGB", sheet_size, "white")

    # The images, row by row
    for index, array in enumerate(arrays):
        row, column = divmod(index, columns)
        corner = (column * column_width, row * row_height)
        sheet.paste(Image.fromarray(array), corner)
    return sheet
