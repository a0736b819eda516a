"""Two ranks under torchrun give the same images and metrics as one process."""

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
from evaluate.machine_keys import MACHINE_KEYS
from PIL import Image

from diffusion2gan.evaluate.pocket import HELD_OUT_WORLD, real_images
from diffusion2gan.generate import generate
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import sha256

COUNT, CHUNK = 70, 64  # two cache files
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_python(*arguments: object, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=timeout_s,
    )


def cache_renderings_as_teacher_images(cache: Path) -> None:
    """Puts renderings into the cache as the pocket teacher's images, which would take a minute."""
    images = real_images(COUNT, 0)
    prompts = scenes.captions(range(COUNT), HELD_OUT_WORLD)
    folder = cache / f"{load_system('pocket-teacher').key}-0"
    folder.mkdir(parents=True, exist_ok=True)

    for start in range(0, COUNT, CHUNK):
        chunk = list(prompts[start : start + CHUNK])
        pictures = torch.from_numpy(images[start : start + CHUNK].copy())
        path = folder / f"{start:06d}-{len(chunk)}.safetensors"
        checkpoint.save(path, {"pictures": pictures}, {"prompts": chunk})


def evaluate_one_step(teacher: Path, out: Path, *launcher: str) -> tuple[dict[str, Any], str]:
    """metrics.json without times and memory, and what was printed."""
    cache_renderings_as_teacher_images(out / "pictures")
    options = "--num-inference-steps 1 --guidance-scale 0 --num-resamples 0".split()
    completed = run_python(
        *launcher,
        "-m",
        "diffusion2gan",
        "evaluate",
        teacher,
        "--count",
        COUNT,
        *options,
        "--out",
        out / "metrics.json",
    )
    assert completed.returncode == 0, completed.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    for key in MACHINE_KEYS:
        metrics.pop(key, None)
    return metrics, completed.stdout


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Every number and string of a nested value by its path."""
    if not isinstance(value, dict | list):
        return {name: value}
    leaves = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        leaves.update(flatten(inner, f"{name}/{key}"))
    return leaves


def file_digests(folder: Path) -> dict[Path, str]:
    return {path.relative_to(folder): sha256(path) for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_two_ranks_measure_the_same_as_one_process(tiny_teacher: Path, tmp_path: Path) -> None:
    alone, _ = evaluate_one_step(tiny_teacher, tmp_path / "alone")
    shared, printed = evaluate_one_step(tiny_teacher, tmp_path / "ranks", *TORCHRUN)
    assert printed.count("\nfrechet_distance:") == 1  # rank 0 prints

    # Equal metrics, up to the rounding of features
    expected, found = flatten(alone), flatten(shared)
    assert found.keys() == expected.keys()
    num_floats = 0
    for key, value in expected.items():
        if isinstance(value, float):
            num_floats += 1
            assert found[key] == pytest.approx(value, rel=1e-6), key
        else:
            assert found[key] == value, key
    assert num_floats > 10

    # Equal images
    digests = file_digests(tmp_path / "alone")
    assert file_digests(tmp_path / "ranks") == digests and len(digests) == 4


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
        print("FAILED", error, flush=True)
        reported.touch()
        os._exit(0)
"""


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    completed = run_python(*TORCHRUN, tmp_path / "late.py")
    assert "FAILED rank 1 did not finish its share" in completed.stdout, completed.stderr


def test_two_ranks_generate_the_same_grid_as_one_process(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """Three rows: the last round has one for the first rank alone."""
    # One process, with one thread as the ranks
    prompts = ["a star", "two rings", "a blue heart"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generate(load_system(str(tiny_teacher), 1, 0.0), prompts, 0, 2, tmp_path / "alone.png")
    torch.set_num_threads(threads)

    # Two ranks
    options = "--num-inference-steps 1 --guidance-scale 0 --per-prompt 2".split()
    for prompt in prompts:
        options += ["--prompt", prompt]
    completed = run_python(
        *TORCHRUN,
        "-m",
        "diffusion2gan",
        "generate",
        tiny_teacher,
        *options,
        "--out",
        tmp_path / "ranks.png",
        timeout_s=300,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count(": 6 images, 1 step") == 1
    assert completed.stderr.count("generate: 6/6") == 1

    # The same grid, with three different rows
    assert sha256(tmp_path / "alone.png") == sha256(tmp_path / "ranks.png")
    pixels = np.asarray(Image.open(tmp_path / "ranks.png"))
    assert len({pixels[top : top + 64].tobytes() for top in (0, 66, 132)}) == 3
