"""What every test shares. Imported before each run, so it imports nothing heavy itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: much faster beside other processes
os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))  # for the commands that tests start


def pytest_collection_finish() -> None:
    """The same number of threads everywhere, where a test module has loaded torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole pocket pipeline, its weights random (seed 0)."""
    import torch

    from diffusion2gan.pocket import models

    torch.set_num_threads(NUM_THREADS)
    folder = tmp_path_factory.mktemp("tiny_teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models.pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def sd_style_teacher(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under Stable Diffusion 1.5's own scheduler file: PNDM, ε, leading steps, no ᾱ = 1 at the end."""
    from diffusers import PNDMScheduler

    folder = tmp_path_factory.mktemp("sd_style") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    PNDMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
        prediction_type="epsilon",
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name → the folder of that family's tiny pipeline, made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        from tiny_families import save

        return root / name if (root / name).exists() else save(name, root / name)

    return folder
