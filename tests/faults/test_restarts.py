"""torchrun --max-restarts finishes every job that takes ranks after one of them is killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_pocket
from distill.rank_processes import torchrun, wait_for_success
from faults import campaign
from faults.campaign import Job, build_jobs, different_files, prepare
from PIL import Image

from diffusion2gan.teacher.loading import load_teacher

SCRIPT = Path(__file__).with_name("killed_rank.py")
# Job → the rank that is killed, and in place of which of its renamings
KILLED = {
    "pairs, two ranks": (1, 2),
    "distill, two ranks": (0, 3),
    "distill, two ranks, fsdp": (0, 3),
    "evaluate, two ranks": (0, 1),
    "generate, two ranks": (0, 1),
    "perceptual fit, two ranks": (0, 3),
}


def build_fit_job(base: Path) -> Job:
    """`perceptual fit` of a tiny set of images; its network's files are compared."""
    rng = np.random.default_rng(0)
    for name in ("blue", "red"):
        (base / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(base / "images" / name / f"{number}.png")

    def argv(out: Path) -> list[object]:
        options = ("--size", 16, "--epochs", 2, "--batch-size", 8)
        images = base / "images"
        return ["perceptual", "fit", "--images", images, "--vae", "pocket", *options, "--out", out]

    def differs(reference: Path, found: Path) -> list[str]:
        return [name for name in different_files(reference, found) if not name.startswith("work/")]

    return Job("perceptual fit, two ranks", argv, differs, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restarts")
    load_teacher(str(tiny_pocket.save(folder / "teacher")))  # what it imports, before the forks
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_job_with_a_killed_rank_is_finished_by_restarting(name: str, base: Path) -> None:
    jobs = build_jobs(base, base / "teacher")
    if name.startswith("perceptual"):
        jobs.append(build_fit_job(base))
    job = {job.name: job for job in jobs}[name]
    prepare(job, base, jobs)
    folder = base / name.replace(", ", "-").replace(" ", "-")
    folder.mkdir()
    campaign.run_to_end(job, folder / "reference")

    rank, renames = KILLED[name]
    command = [SCRIPT, rank, renames, *job.argv(folder / "restarted")]
    _, err = wait_for_success(torchrun(2, "--max-restarts", 2, *command))
    assert "KILLED before" in err
    assert job.differs(folder / "reference", folder / "restarted") == []

    # Nothing unfinished is left
    assert not [*folder.rglob(".*.tmp"), *folder.rglob(".*.lock")]


def test_every_job_with_ranks_is_tried(tmp_path: Path) -> None:
    jobs = [*build_jobs(tmp_path, tmp_path), build_fit_job(tmp_path)]
    assert {job.name for job in jobs if job.ranks == 2} == set(KILLED)
