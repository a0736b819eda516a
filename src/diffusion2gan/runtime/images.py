"""Conversion between tensors in [−1, 1] and 8-bit images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [−1, 1] → [B, H, W, 3] uint8, rounded as diffusers does."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 → [B, 3, H, W] float32 in [−1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


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
