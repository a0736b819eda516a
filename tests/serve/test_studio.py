"""What the served page does: noises, limits, refusals, the history."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.serve import studio
from diffusion2gan.serve.studio import Painter

SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(load_system("pocket-student"))


def test_the_noise_goes_from_one_seed_to_the_next_and_stays_normal() -> None:
    big = (4, 128, 128)
    a, b = noise_from_seeds([7], big), noise_from_seeds([8], big)
    assert torch.equal(studio.noise_between(7, 0, big), a)
    assert torch.allclose(studio.noise_between(7, 1, big), b, atol=1e-6)
    half = studio.noise_between(7, 0.5, big)
    assert torch.allclose(half, (a + b) / 2**0.5, atol=1e-6)
    assert abs(half.std().item() - 1) < 0.01 and abs(half.mean().item()) < 0.01
    assert studio.noise_between(studio.MAX_SEED, 0.5, SHAPE).shape == (1, *SHAPE)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: studio.noise_between(-1, 0, SHAPE), "seed -1: seeds go from 0"),
        (lambda: studio.noise_between(2**32, 0, SHAPE), "seed 4294967296"),
        (lambda: studio.noise_between(0, 1.5, SHAPE), "from 0 to 1"),
        (lambda: studio.noise_between(0, float("nan"), SHAPE), "from 0 to 1"),
        (
            lambda: studio.noises(0, 1000, SHAPE),
            "1000 pictures asked for, and one request makes 1 to 64",
        ),
        (lambda: studio.noises(0, 0, SHAPE), "0 pictures"),
        (lambda: studio.noises(2**32 - 2, 4, SHAPE), "seeds go from 0 to 4294967292"),
        (lambda: studio.check_prompt(" \n"), "the prompt is empty"),
        (lambda: studio.check_prompt("x" * 10_000), "has 10000 characters, and at most 2000"),
    ],
)
def test_limits_are_told(call: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        call()


def test_a_picture_is_the_systems_own_whatever_is_asked_beside_it(painter: Painter) -> None:
    noise = studio.noises(3, 2, SHAPE)
    together, seconds = painter.paint(" a red\nring ", noise)
    alone, _ = painter.paint("a red ring", noise[1:])
    assert seconds > 0 and together[0].size == (64, 64)
    direct = painter.system.generate(["a red ring"] * 2, noise)
    assert np.array_equal(np.stack(together), direct)
    assert np.abs(np.asarray(alone[0]).astype(int) - direct[1]).max() <= 1


@pytest.mark.parametrize(
    "prompt", ["<script>alert(1)</script>", "كرة حمراء", "🦊🌧️", "{{x}}", "a" * 2000, "\u202e\x00"]
)
def test_odd_prompts_make_a_picture(painter: Painter, prompt: str) -> None:
    assert painter.paint(prompt, studio.noises(0, 1, SHAPE))[0][0].size == (64, 64)


def test_what_the_tokenizer_leaves_out_is_told(painter: Painter) -> None:
    assert painter.reads("a red ring") == ""
    assert painter.reads("a red ring and " * 20).startswith("only the first 24 of ")


def test_a_system_that_fails_is_named_and_works_again(painter: Painter) -> None:
    with pytest.raises(Failure, match=r"pocket-student failed: .* Try again"):
        painter.paint("a red ring", torch.zeros(1, 5, 16, 16))  # a channel too many
    assert painter.paint("a red ring", studio.noises(0, 1, SHAPE))[0]


def test_requests_at_once_do_not_disturb_one_another(painter: Painter) -> None:
    noise = studio.noises(0, 1, SHAPE)
    prompts = ["a red ring on pink", "a blue star on sand", "a green moon on grey"]
    alone = [painter.paint(prompt, noise)[0][0].tobytes() for prompt in prompts]
    made: dict[str, bytes] = {}

    def paint(prompt: str) -> None:
        made[prompt] = painter.paint(prompt, noise)[0][0].tobytes()

    threads = [threading.Thread(target=paint, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[prompt] for prompt in prompts] == alone


def test_the_history_is_on_disk(tmp_path: Path) -> None:
    assert studio.history(tmp_path / "none", 4) == []
    for i in range(3):
        about = {"prompt": f"<b>{i}</b> 🦊" + "x" * 100, "seed": i, "system": "s"}
        studio.keep(tmp_path, Image.new("RGB", (8, 8), (i, 0, 0)), about)
    (tmp_path / "9.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "0.png")
    found = studio.history(tmp_path, 10)
    assert [picture.getpixel((0, 0)) for picture, _ in found] == [
        (2, 0, 0),
        (1, 0, 0),
        (0, 0, 0),
        (9, 9, 9),
    ]
    assert found[0][1].startswith("<b>2</b> 🦊xx") and found[0][1].endswith("… · seed 2 · s")
    assert len(studio.history(tmp_path, 2)) == 1  # the newest two, of which one is no picture
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
