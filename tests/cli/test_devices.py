"""A device that does not exist: the same plain error in every command, and no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli.runner import run

from diffusion2gan import assets

PAIRS = assets.folder("pairs")
COMMANDS = {
    "pairs": "pairs --count 4 --out {out}",
    "pairs --dry-run": "pairs --count 4 --dry-run --out {out}",
    "pairs verify": f"pairs verify {PAIRS} --deep 1",
    "distill": f"distill pocket-regression --pairs {PAIRS} --out {{out}} --set",
    "distill --dry-run": f"distill pocket-regression --pairs {PAIRS} --out {{out}} --dry-run --set",
    "generate": "generate pocket-student --prompt star --out {out}/grid.png",
    "evaluate": "evaluate pocket-student --count 2 --out {out}/metrics.json",
    "compare": "compare --system student=pocket-student --prompts {prompts} --out {out}",
    "serve": "serve pocket-student --history {out}",
    "serve --vote": "serve --vote pocket-student pocket-teacher --prompts {prompts} --votes {out}",
    "perceptual fit": "perceptual fit --images {out}/none --pixels --out {out}",
    "perceptual calibrate": (
        "perceptual calibrate --triplets {out}/none --network pocket --out {out}"
    ),
    "pocket train": "pocket train --scale 0.0001 --out {out}",
}


@pytest.mark.parametrize("device", ["cuda:7", "meta", "mps"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_unavailable_device_is_refused_in_one_paragraph(
    name: str, device: str, tmp_path: Path
) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue star\n")
    command = COMMANDS[name].format(out=out, prompts=prompts).split()
    last_word_is_set = command[-1] == "--set"
    command += [f"device={device}"] if last_word_is_set else ["--device", device]

    result = run(*command)
    assert result.code == 2, result.out + result.err
    message = " ".join(result.err.split())
    assert f"device {device!r}" in message
    assert device != "mps" or "not supported" in message
    assert ("set device=cpu" if last_word_is_set else "give --device cpu") in message
    assert "Traceback" not in result.err and not out.exists()
