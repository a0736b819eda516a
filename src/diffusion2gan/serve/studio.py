"""What the served page does, without the page: pictures of a prompt, with limits and clear refusals."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion2gan.errors import Diffusion2GANError, Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime.files import write_image

MAX_LETTERS = 2000  # of a prompt: more than any text encoder reads
MAX_PICTURES = 64  # of one request
MAX_SEED = 2**32 - 1
BATCH = 16


@dataclass(frozen=True)
class Painter:
    """A system that several requests share: one at a time, since a pipeline's scheduler holds a state."""

    system: System
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paint(self, prompt: str, noise: Tensor) -> tuple[list[Image.Image], float]:
        """A picture of `prompt` from each row of `noise` [B, C, h, w], and the seconds it took.

        Raises UserError for a prompt that is empty or too long, Failure where the system itself fails.
        """
        words = check_prompt(prompt)
        with self.lock:
            start = time.perf_counter()
            try:
                made = [
                    self.system.generate([words] * len(part), part) for part in noise.split(BATCH)
                ]
            except Diffusion2GANError:
                raise
            except (
                Exception
            ) as error:  # whatever a pipeline raises: the page must say it and live on
                raise Failure(
                    f"{self.system.name} failed: {type(error).__name__}: {error}. Try again."
                ) from error
            seconds = time.perf_counter() - start
        return [Image.fromarray(picture) for part in made for picture in part], seconds

    def reads(self, prompt: str) -> str:
        """What the tokenizer leaves out of a prompt, in words; empty where it reads all."""
        tokenizer, limit = self.system.tokenizer, self.system.num_tokens
        length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
        return f"only the first {limit} of {length} tokens are read" if length > limit else ""


def check_prompt(prompt: str) -> str:
    """The prompt on one line. Raises UserError where it is empty or longer than MAX_LETTERS."""
    words = " ".join(prompt.split())
    if not words:
        raise UserError("the prompt is empty; type a few words")
    if len(prompt) > MAX_LETTERS:
        raise UserError(
            f"the prompt has {len(prompt)} characters, and at most {MAX_LETTERS} are taken; shorten it"
        )
    return words


def noise_between(seed: int, part: float, shape: tuple[int, int, int]) -> Tensor:
    """[1, C, h, w]: the noise of `seed`, turned by `part` ∈ [0, 1] of a right angle towards that of `seed` + 1.

    cos θ·a + sin θ·b of independent a, b ~ N(0, I) is N(0, I) again. Raises UserError outside of the ranges.
    """
    check_seeds(seed, 1)
    if not 0 <= part <= 1:
        raise UserError(f"the noise's place is {part:g}; it goes from 0 to 1")
    here, there = (
        noise_from_seeds([seed], shape),
        noise_from_seeds([(seed + 1) % (MAX_SEED + 1)], shape),
    )
    angle = part * math.pi / 2
    return (
        here
        if part == 0
        else torch.cos(torch.tensor(angle)) * here + torch.sin(torch.tensor(angle)) * there
    )


def noises(seed: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """[count, C, h, w] from seeds seed, seed + 1, …  Raises UserError beyond MAX_PICTURES."""
    if not 1 <= count <= MAX_PICTURES:
        raise UserError(
            f"{count} pictures asked for, and one request makes 1 to {MAX_PICTURES}; ask several times"
        )
    check_seeds(seed, count)
    return noise_from_seeds([seed + i for i in range(count)], shape)


def check_seeds(seed: int, count: int) -> None:
    if not 0 <= seed <= MAX_SEED - count + 1:
        raise UserError(f"seed {seed}: seeds go from 0 to {MAX_SEED - count + 1} here")


# ------------------------------------------------------------------------------------------------------------ history


def keep(folder: Path, picture: Image.Image, about: dict[str, Any]) -> Path:
    """Writes a picture into the history, with its prompt and seed in the file; returns its path."""
    information = PngInfo()
    information.add_itxt("diffusion2gan", json.dumps(about, ensure_ascii=False))
    path = folder / f"{time.time_ns()}-{os.getpid()}-{threading.get_ident()}.png"
    write_image(path, lambda temporary: picture.save(temporary, pnginfo=information))
    return path


def history(folder: Path, count: int) -> list[tuple[Image.Image, str]]:
    """The newest `count` kept pictures, newest first, each with a line about it. Files that are none are passed by."""
    found = []
    for path in sorted(folder.glob("*.png"), reverse=True)[:count]:
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
                found.append((picture, _told(image.info.get("diffusion2gan", "{}"))))
        except (OSError, ValueError):
            continue
    return found


def _told(text: str) -> str:
    about = json.loads(text)
    words = " ".join(str(about.get("prompt", "")).split())
    parts: Sequence[str] = [
        words if len(words) <= 80 else words[:79] + "…",
        f"seed {about.get('seed', '?')}",
    ]
    return " · ".join([*parts, *([str(about["system"])] if "system" in about else [])])
