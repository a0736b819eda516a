"""Conversion between image files, tensors in [−1, 1] and 8-bit images.

Files are read safely: their size is looked at before their pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion2gan.errors import Diffusion2GANError, Failure
from diffusion2gan.runtime.files import translate_error

# How `read_rgb` reads a file, as evaluation protocols state it
READING = (
    "turned as EXIF says; 16 bit divided by 257 and rounded; transparency over white; first frame; "
    "colour profiles ignored"
)
# The formats that are read. Pillow knows others, some of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The largest photograph that is read, 8192 × 8192, and the largest image of a system, 4096 × 4096:
# a file of some kilobytes can contain gigabytes of pixels.
MAX_PIXELS = 2**26
MAX_GENERATED_PIXELS = 2**24
# How many times as long as wide an image may be: resized by its shorter side, it grows by this.
MAX_ASPECT = 100


class BadImage(Exception):
    """An image file that cannot be read, and the reason."""


@contextmanager
def open_image(file: Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Yields a Pillow image whose header was read, but not its pixels.

    Raises BadImage if it is not an image or damaged (also while the block reads its pixels), or has
    more than `max_pixels` pixels or more than MAX_ASPECT times as many in one direction; Failure
    if the machine cannot read it.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, which the limits here refuse
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(file, formats=FORMATS)
        with opened:
            check_image_size(*opened.size, max_pixels)
            yield opened
    except (BadImage, Diffusion2GANError):
        raise
    except Exception as error:
        # For damaged files Pillow raises many kinds: OSError, SyntaxError, struct.error, …
        failure = translate_error(file if isinstance(file, Path) else "an image", error)
        if failure is not None:
            raise failure from error
        raise BadImage(f"{type(error).__name__}: {error}") from error


def check_image_size(width: int, height: int, max_pixels: int) -> None:
    """Raises BadImage if an image of this size is not read."""
    if width * height > max_pixels:
        raise BadImage(
            f"it has {width}×{height} pixels, and at most {max_pixels} are read, such as "
            f"{math.isqrt(max_pixels)}×{math.isqrt(max_pixels)}"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(
            f"it has {width}×{height} pixels, and one side may be at most {MAX_ASPECT} times as "
            "long as the other"
        )


def read_rgb(file: Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image file as 8-bit RGB.

    It is turned as its EXIF orientation says. 16-bit grey values are divided by 257 and rounded
    (Pillow itself reads 16-bit colours that way, by their upper byte). Transparent pixels are
    composed over white. Of an animation it is the first frame. Colour profiles are ignored. Raises
    BadImage as `open_image` does, and for grey values of 32 bits, whose range is not known.
    """
    with open_image(file, max_pixels) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in ("I", "F"):
            raise BadImage("its grey values have 32 bits, whose range is not known")
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
