"""Image generation for the served pages, without gradio: limits, checks and clear errors."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from diffusion2gan.errors import Diffusion2GANError, Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import System

MAX_PROMPT_LENGTH = 2000  # characters: more than any text encoder reads
MAX_IMAGES = 64  # per request
MAX_SEED = 2**32 - 1
BATCH_SIZE = 16


@dataclass(frozen=True)
class SharedSystem:
    """A system used by several requests, one at a time: the scheduler of a pipeline has state."""

    system: System
    lock: threading.Lock = field(default_factory=threading.Lock)

    def generate(self, prompt: str, noise: Tensor) -> tuple[list[Image.Image], float]:
        """Generates an image of `prompt` from each row of `noise` [B, C, h, w].

        Returns the images and the seconds it took. Raises UserError if the prompt is empty or too
        long, and Failure if the pipeline fails.
        """
        prompt = check_prompt(prompt)
        images = []
        with self.lock:
            start = time.perf_counter()
            try:
                for batch in noise.split(BATCH_SIZE):
                    pixels = self.system.generate([prompt] * len(batch), batch)
                    images += [Image.fromarray(image) for image in pixels]
            except Diffusion2GANError:
                raise
            except Exception as error:
                # The page reports any error of the pipeline and stays usable
                raise Failure(
                    f"{self.system.name} failed: {type(error).__name__}: {error}. Try again."
                ) from error
            seconds = time.perf_counter() - start
        return images, seconds

    def truncation_note(self, prompt: str) -> str:
        """How much of a prompt is read, if the text encoder truncates it; otherwise empty."""
        limit = self.system.num_tokens
        token_ids = self.system.tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(token_ids) <= limit:
            return ""
        return f"only the first {limit} of {len(token_ids)} tokens are read"


# ------------------------------------------------------------------------------- Checks and noise


def check_prompt(prompt: str) -> str:
    """Returns the prompt on one line.

    Raises UserError if it is empty or longer than MAX_PROMPT_LENGTH.
    """
    one_line = " ".join(prompt.split())
    if not one_line:
        raise UserError("the prompt is empty; type a few words")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise UserError(
            f"the prompt has {len(prompt)} characters, and at most {MAX_PROMPT_LENGTH} are "
            "allowed; shorten it"
        )
    return one_line


def check_seeds(seed: int, count: int) -> None:
    """Raises UserError unless seed, seed + 1, …, seed + count − 1 are valid seeds."""
    last = MAX_SEED - count + 1
    if not 0 <= seed <= last:
        raise UserError(f"seed {seed} is out of range; choose one from 0 to {last}")


def noise_between(seed: int, fraction: float, shape: tuple[int, int, int]) -> Tensor:
    """Noise [1, C, h, w] on the way from `seed` (fraction 0) to `seed` + 1 (fraction 1).

    With θ = fraction · π/2, it is cos θ · a + sin θ · b. For independent a, b ~ N(0, I), this is
    N(0, I) again. Raises UserError if an argument is out of range.
    """
    check_seeds(seed, 1)
    if not 0 <= fraction <= 1:
        raise UserError(
            f"the noise slider is at {fraction:g}, which is out of range; choose a number "
            "from 0 to 1"
        )

    noise = noise_from_seeds([seed], shape)
    if fraction == 0:
        return noise
    next_noise = noise_from_seeds([(seed + 1) % (MAX_SEED + 1)], shape)
    angle = torch.tensor(fraction * math.pi / 2)
    return torch.cos(angle) * noise + torch.sin(angle) * next_noise


def noise_batch(seed: int, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise [count, C, h, w] from the seeds seed, seed + 1, …

    Raises UserError if `count` is more than MAX_IMAGES or less than 1, or a seed is out of range.
    """
    if not 1 <= count <= MAX_IMAGES:
        raise UserError(
            f"{count} images were requested, but a request can have 1 to {MAX_IMAGES}; "
            "choose a number in this range"
        )
    check_seeds(seed, count)
    return noise_from_seeds([seed + i for i in range(count)], shape)
