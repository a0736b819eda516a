"""What the commands show in a terminal: Ctrl-C, `--quiet`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
from cli.runner import run

from diffusion2gan.distill import steps
from diffusion2gan.distill.run import Run
from diffusion2gan.pairs import make
from diffusion2gan.runtime import progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, prompts and pairs."""
    folder = tmp_path_factory.mktemp("terminal")
    tiny_pocket.save(folder / "teacher")
    (folder / "prompts.txt").write_text("a star\na moon\n")
    assert make_pairs(folder, "pairs").code == 0
    return folder


@pytest.fixture(autouse=True)
def shown_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quiet` lasts as long as the process: restore it after each test."""
    monkeypatch.setattr(progress, "_show_progress", True)


def make_pairs(folder: Path, name: str, *options: object) -> Any:
    return run(
        *("pairs", "--teacher", folder / "teacher", "--prompts", folder / "prompts.txt"),
        *("--count", 4, "--num-inference-steps", 1, "--shard-size", 2, "--out", folder / name),
        *options,
    )


def distill(folder: Path, out: Path, *options: object) -> Any:
    settings = [
        f"teacher={folder / 'teacher'}",
        "loss=mse",
        "total_pairs=8",
        "batch_size=2",
    ]
    words: list[object] = ["distill", "pocket-regression", "--pairs", folder / "pairs"]
    for setting in settings:
        words += ["--set", setting]
    return run(*words, "--out", out, *options)


def send_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_a_run_says_that_all_is_saved_and_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = steps.student_step

    def student_step(run: Run, *args: Any) -> Any:
        if run.pairs_seen == 2:
            send_ctrl_c()
        return real(run, *args)

    monkeypatch.setattr(steps, "student_step", student_step)
    result = distill(folder, tmp_path / "run")
    assert result.code == 130
    assert result.err.splitlines()[-1] == (
        f"stopped and saved: 4 of 8 pairs are in {tmp_path / 'run'}; run the same command to "
        "continue"
    )
    assert "stopping after this step (Ctrl-C again stops at once)" in result.err
    assert "Traceback" not in result.err

    # It is true
    monkeypatch.setattr(steps, "student_step", real)
    result = distill(folder, tmp_path / "run")
    assert result.code == 0
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_in_another_job_says_that_finished_work_is_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = make.make_shard

    def make_shard(*args: Any) -> None:
        real(*args)
        send_ctrl_c()

    monkeypatch.setattr(make, "make_shard", make_shard)
    result = make_pairs(folder, "interrupted")
    assert result.code == 130
    assert result.err.endswith(
        "stopped. What was finished is saved; to continue, run the same command again.\n"
    )
    assert len(list((folder / "interrupted").glob("*.parquet"))) == 1
    monkeypatch.setattr(make, "make_shard", real)
    assert make_pairs(folder, "interrupted").code == 0


def test_quiet_leaves_results_alone(folder: Path, tmp_path: Path) -> None:
    loud = distill(folder, tmp_path / "loud")
    assert "total_pairs = 8" in loud.out and "8/8" in loud.err
    quiet = distill(folder, tmp_path / "quiet", "--quiet")
    assert quiet.err == ""
    assert quiet.out.splitlines() == [
        f"{tmp_path / 'quiet'}: 8 pairs seen. Next: diffusion2gan export {tmp_path / 'quiet'} "
        "--out export/NAME"
    ]


def test_quiet_still_prints_errors(folder: Path, tmp_path: Path) -> None:
    result = distill(folder, tmp_path / "run", "--quiet", "--set", "total_pairs=0")
    assert result.code == 2
    assert "total_pairs = '0'" in result.err
