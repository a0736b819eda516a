"""What the served page does without gradio: noise, limits, refusals, concurrent requests."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.serve import generation
from diffusion2gan.serve.generation import SharedSystem

SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def student() -> SharedSystem:
    return SharedSystem(load_system("pocket-student"))


def test_noise_between_two_seeds_stays_standard_normal() -> None:
    large = (4, 128, 128)
    start, end = noise_from_seeds([7], large), noise_from_seeds([8], large)
    assert torch.equal(generation.noise_between(7, 0, large), start)
    assert torch.allclose(generation.noise_between(7, 1, large), end, atol=1e-6)

    middle = generation.noise_between(7, 0.5, large)
    assert torch.allclose(middle, (start + end) / 2**0.5, atol=1e-6)
    assert abs(middle.std().item() - 1) < 0.01
    assert abs(middle.mean().item()) < 0.01

    # After the last seed comes the first
    assert generation.noise_between(generation.MAX_SEED, 0.5, SHAPE).shape == (1, *SHAPE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: generation.noise_between(-1, 0, SHAPE),
            "seed -1 is out of range; choose one from 0",
        ),
        (lambda: generation.noise_between(2**32, 0, SHAPE), "seed 4294967296"),
        (lambda: generation.noise_between(0, 1.5, SHAPE), "from 0 to 1"),
        (lambda: generation.noise_between(0, float("nan"), SHAPE), "from 0 to 1"),
        (
            lambda: generation.noise_batch(0, 1000, SHAPE),
            "1000 images were requested, but a request can have 1 to 64",
        ),
        (lambda: generation.noise_batch(0, 0, SHAPE), "0 images"),
        (lambda: generation.noise_batch(2**32 - 2, 4, SHAPE), "from 0 to 4294967292"),
        (lambda: generation.check_prompt(" \n"), "the prompt is empty"),
        (lambda: generation.check_prompt("x" * 10_000), "has 10000 characters, and at most 2000"),
    ],
)
def test_values_out_of_range_are_refused_with_the_limit(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_images_are_those_of_the_system_and_do_not_depend_on_the_batch(
    student: SharedSystem,
) -> None:
    noise = generation.noise_batch(3, 2, SHAPE)
    images, seconds = student.generate(" a red\nring ", noise)
    assert seconds > 0
    assert images[0].size == (64, 64)

    expected = student.system.generate(["a red ring"] * 2, noise)
    assert np.array_equal(np.stack(images), expected)
    (alone,), _ = student.generate("a red ring", noise[1:])
    assert np.abs(np.asarray(alone).astype(int) - expected[1]).max() <= 1


@pytest.mark.parametrize(
    "prompt", ["<script>alert(1)</script>", "كرة حمراء", "🦊🌧️", "{{x}}", "a" * 2000, "\u202e\x00"]
)
def test_unusual_prompts_generate_an_image(student: SharedSystem, prompt: str) -> None:
    images, _ = student.generate(prompt, generation.noise_batch(0, 1, SHAPE))
    assert images[0].size == (64, 64)


def test_truncated_prompts_are_reported_with_both_token_counts(student: SharedSystem) -> None:
    assert student.truncation_note("a red ring") == ""
    note = student.truncation_note("a red ring and " * 20)
    assert note.startswith("only the first 24 of ")


def test_a_failing_system_is_named_and_works_again_afterwards(student: SharedSystem) -> None:
    one_channel_too_many = torch.zeros(1, 5, 16, 16)
    with pytest.raises(Failure, match=r"pocket-student failed: .* Try again"):
        student.generate("a red ring", one_channel_too_many)

    images, _ = student.generate("a red ring", generation.noise_batch(0, 1, SHAPE))
    assert len(images) == 1


def test_concurrent_requests_do_not_affect_each_other(student: SharedSystem) -> None:
    noise = generation.noise_batch(0, 1, SHAPE)
    prompts = ["a red ring on pink", "a blue star on sand", "a green moon on grey"]

    def generate(prompt: str) -> bytes:
        images, _ = student.generate(prompt, noise)
        return images[0].tobytes()

    expected = {prompt: generate(prompt) for prompt in prompts}
    results: dict[str, bytes] = {}

    def request(prompt: str) -> None:
        results[prompt] = generate(prompt)

    threads = [threading.Thread(target=request, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected
