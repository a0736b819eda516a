"""An output that cannot be written gives one line of error, and nothing is half-written.

With a real read-only disk, which root cannot write either.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pocket
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusion2gan import cli
from diffusion2gan.distill.train import distill
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.teacher.loading import load_teacher

# Mounts a read-only disk, visible to the command alone, and runs the command.
MOUNT = ["sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"']
COMMANDS = ("pairs", "distill", "export", "evaluate", "generate")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its pairs and a run on them. Tests must not change it."""
    folder = tmp_path_factory.mktemp("shared")
    teacher = load_teacher(str(tiny_pocket.save(folder / "teacher")))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 1, 1.0, teacher.latent_shape, 2)
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, folder / "pairs")
    recipe = Recipe(teacher=str(folder / "teacher"), loss="mse", total_pairs=2, batch_size=2)
    distill(recipe, folder / "pairs", folder / "run")
    return folder


def argv(command: str, shared: Path, out: Path) -> list[str]:
    one_step = ("--num-inference-steps", 1, "--guidance-scale", 0)
    settings = (f"teacher={shared / 'teacher'}", "loss=mse", "total_pairs=2", "batch_size=2")
    sets = [word for setting in settings for word in ("--set", setting)]
    words: dict[str, tuple[object, ...]] = {
        "pairs": (
            "--teacher",
            shared / "teacher",
            "--prompts",
            "pocket",
            "--count",
            2,
            *one_step[:2],
            "--guidance-scale",
            1,
            "--out",
            out,
        ),
        "distill": ("pocket-regression", "--pairs", shared / "pairs", "--out", out, *sets),
        "export": (shared / "run", "--out", out / "export"),
        "evaluate": (shared / "teacher", "--count", 2, *one_step, "--out", out / "metrics.json"),
        "generate": (
            shared / "teacher",
            *one_step,
            "--prompt",
            "a star",
            "--out",
            out / "grid.png",
        ),
    }
    return [command, *map(str, words[command])]


def isolated() -> list[str]:
    """The prefix that gives a command private mounts. Skips the test if they are not allowed."""
    if shutil.which("unshare"):
        # As root, or in a user name space
        for options in ("-m", "-rm"):
            command = ["unshare", options, *MOUNT, "/mnt", "true"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return ["unshare", options]
    pytest.skip("no private mounts here (unshare -m, as root or in a user name space)")


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_disk_is_reported(command: str, shared: Path, tmp_path: Path) -> None:
    before = read_files(shared)
    out = tmp_path / "out"
    out.mkdir()
    ran = subprocess.run(
        [
            *isolated(),
            *MOUNT,
            str(out),
            sys.executable,
            "-m",
            "diffusion2gan",
            *argv(command, shared, out),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "Read-only file system" in last
    assert str(out) in last and "--out" in last
    assert read_files(shared) == before and [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_place_of_the_output_folder_is_reported(
    command: str,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    before = read_files(shared)
    monkeypatch.setattr(
        sys, "argv", ["diffusion2gan", *argv(command, shared, tmp_path / "file" / "below")]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and last.startswith("error: ") and "file" in last and "--out" in last
    assert read_files(shared) == before and read_files(tmp_path) == {"file": b"mine"}


def test_a_safetensors_write_error_becomes_an_os_error(tmp_path: Path) -> None:
    """safetensors raises an error with only a text: here for a file name that becomes too long."""
    path = tmp_path / ("x" * 250)
    with pytest.raises(SafetensorError, match="os error 36"):
        save_file({}, path.with_name(f"{path.name}.too.long"))
    with pytest.raises(OSError, match=r"File name too long.*xxx") as raised:
        checkpoint.save(path, {}, {})
    assert raised.value.errno == errno.ENAMETOOLONG and list(tmp_path.iterdir()) == []
