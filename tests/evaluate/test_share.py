"""Evaluation and generation by ranks: two processes under torchrun make the pictures, the same as one alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion2gan.evaluate.run import HELD_OUT_WORLD, real_pictures
from diffusion2gan.generate import generate
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import sha256

COUNT, PART = 70, 64  # two files of pictures
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMED = {"seconds_per_image", "seconds_per_image_p90", "images_per_second", "peak_memory_bytes"}


def keep_reference(cache: Path) -> None:
    """Renderings in the place of the pocket teacher's pictures, which cost a minute."""
    made, prompts = real_pictures(COUNT, 0), scenes.captions(range(COUNT), HELD_OUT_WORLD)
    for start in range(0, COUNT, PART):
        some = prompts[start : start + PART]
        path = (
            cache
            / f"{load_system('pocket-teacher').key}-0"
            / f"{start:06d}-{len(some)}.safetensors"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures = torch.from_numpy(made[start : start + PART].copy())
        checkpoint.save(path, {"pictures": pictures}, {"prompts": list(some)})


def evaluated(teacher: Path, out: Path, *launcher: str) -> tuple[dict[str, Any], str]:
    """metrics.json without what is timed, and what was printed."""
    keep_reference(out / "pictures")
    argv = [
        "evaluate",
        teacher,
        "--count",
        COUNT,
        "--num-inference-steps",
        1,
        "--guidance-scale",
        0,
        "--num-resamples",
        0,
        "--out",
        out / "metrics.json",
    ]
    ran = subprocess.run(
        [sys.executable, *launcher, "-m", "diffusion2gan", *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads((out / "metrics.json").read_text())
    return {key: value for key, value in told.items() if key not in TIMED}, ran.stdout


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every number and word by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            key: leaf
            for place, inner in items
            for key, leaf in flat(inner, f"{name}/{place}").items()
        }
    return {name: value}


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_does(tiny_teacher: Path, tmp_path: Path) -> None:
    alone, _ = evaluated(tiny_teacher, tmp_path / "alone")
    ours, printed = evaluated(tiny_teacher, tmp_path / "ranks", *TORCHRUN)
    found, expected = flat(ours), flat(alone)
    numbers = [key for key, value in expected.items() if isinstance(value, float)]
    assert (
        found.keys() == expected.keys()
        and len(numbers) > 10
        and printed.count("\nfrechet_distance:") == 1
    )
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, rel=1e-6) if key in numbers else value), key
    made = [
        {file.relative_to(f): sha256(file) for file in f.rglob("*.safetensors")}
        for f in tmp_path.iterdir()
    ]
    assert made[0] == made[1] and len(made[0]) == 4


LATE = """
import os, sys, time, torch
from pathlib import Path
from diffusion2gan.errors import Failure
from diffusion2gan.runtime import distributed
reported = Path(__file__).with_name("reported")
distributed.BARRIER_TIMEOUT_S = 2
with distributed.connect_ranks(torch.device("cpu")) as group:
    if group.ranks.rank == 1:
        while not reported.exists():  # hangs until rank 0 has reported it
            time.sleep(0.05)
        os._exit(0)
    try:
        group.barrier()
    except Failure as error:
        print("TOLD", error, flush=True)
        reported.touch()
        os._exit(0)
"""


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    ran = subprocess.run(
        [sys.executable, *TORCHRUN, str(tmp_path / "late.py")], capture_output=True, text=True
    )
    assert "TOLD rank 1 did not finish its share" in ran.stdout, ran.stderr


def test_two_ranks_make_the_same_grid(tiny_teacher: Path, tmp_path: Path) -> None:
    """Three rows: the last round has one for the first rank alone."""
    prompts = ["a star", "two rings", "a blue heart"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generate(load_system(str(tiny_teacher), 1, 0.0), prompts, 0, 2, tmp_path / "alone.png")
    torch.set_num_threads(threads)
    argv = [
        "generate",
        tiny_teacher,
        "--num-inference-steps",
        1,
        "--guidance-scale",
        0,
        "--per-prompt",
        2,
    ]
    argv += [word for prompt in prompts for word in ("--prompt", prompt)] + [
        "--out",
        tmp_path / "ranks.png",
    ]
    ran = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "diffusion2gan", *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(": 6 pictures, 1 step") == 1 and ran.stderr.count("generate: 6/6") == 1
    assert sha256(tmp_path / "alone.png") == sha256(tmp_path / "ranks.png")
    rows = np.asarray(Image.open(tmp_path / "ranks.png"))
    assert len({rows[top : top + 64].tobytes() for top in (0, 66, 132)}) == 3
