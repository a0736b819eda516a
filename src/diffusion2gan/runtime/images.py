"""Tensors in [−1, 1] ↔ 8-bit pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [−1, 1] → [B, H, W, 3] uint8, rounded, as diffusers does."""
    return (
        ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    )


def from_uint8(pictures: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 → [B, 3, H, W] float32 in [−1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in to_uint8(images)]


def contact_sheet(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """A contact sheet, row by row, on white."""
    pictures = to_uint8(images)
    _, height, width, _ = pictures.shape
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        canvas.paste(Image.fromarray(picture), (column * (width + gap), row * (height + gap)))
    return canvas
