"""The images that a visitor has saved: PNG files that contain their prompt and seed."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion2gan.compare.text import shorten
from diffusion2gan.runtime.files import write_image
from diffusion2gan.runtime.images import MAX_GENERATED_PIXELS, open_image

METADATA_KEY = "diffusion2gan"
MAX_LENGTH = 80  # characters of a prompt, of a seed or of a name in a caption


def save_image(folder: Path, image: Image.Image, metadata: dict[str, Any]) -> Path:
    """Writes an image into `folder`, with `metadata` (prompt, seed, …) as JSON in the file.

    Returns its path. The names sort by time, and no two requests or processes choose the same.
    """
    png_info = PngInfo()
    png_info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    path = folder / f"{time.time_ns()}-{os.getpid()}-{threading.get_ident()}.png"
    write_image(path, lambda temporary: image.save(temporary, pnginfo=png_info))
    return path


def load_history(folder: Path, count: int) -> list[tuple[Image.Image, str]]:
    """Loads the latest `count` saved images, newest first, each with a caption.

    Files that are not readable images of at most 4096 × 4096 pixels are skipped.
    """
    images = []
    for path in sorted(folder.glob("*.png"), reverse=True)[:count]:
        try:
            with open_image(path, MAX_GENERATED_PIXELS) as file:
                image = file.convert("RGB")
                caption = _build_caption(json.loads(file.info.get(METADATA_KEY, "{}")))
        except Exception:
            # Pillow and JSON raise many kinds for damaged files, and none may end the page
            continue
        images.append((image, caption))
    return images


def _build_caption(metadata: dict[str, Any]) -> str:
    """`prompt · seed 3 · system`."""
    caption = (
        f"{_one_line(metadata.get('prompt', ''))} · seed {_one_line(metadata.get('seed', '?'))}"
    )
    if "system" in metadata:
        caption += f" · {_one_line(metadata['system'])}"
    return caption


def _one_line(value: object) -> str:
    """`value` as a short line. Half of a surrogate pair, which cannot be sent, is replaced."""
    text = str(value)[: 4 * MAX_LENGTH].encode("utf-8", "replace").decode()
    return shorten(" ".join(text.split()), MAX_LENGTH)
