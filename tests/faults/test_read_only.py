"""An output that cannot be written: told in a line, nothing half-written. A real read-only disk, for root too."""

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

MOUNT = [
    "sh",
    "-c",
    'mount -t tmpfs -o ro none "$0" && exec "$@"',
]  # seen by that command alone, gone with it
COMMANDS = ("pairs", "distill", "export", "evaluate", "generate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its pairs and a run of them."""
    folder = tmp_path_factory.mktemp("made")
    teacher = load_teacher(str(tiny_pocket.save(folder / "teacher")))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 1, 1.0, teacher.latent_shape, 2)
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, folder / "pairs")
    recipe = Recipe(teacher=str(folder / "teacher"), loss="mse", total_pairs=2, batch_size=2)
    distill(recipe, folder / "pairs", folder / "run")
    return folder


def argv(command: str, made: Path, out: Path) -> list[str]:
    one_step = ("--num-inference-steps", 1, "--guidance-scale", 0)
    settings = (f"teacher={made / 'teacher'}", "loss=mse", "total_pairs=2", "batch_size=2")
    sets = [word for setting in settings for word in ("--set", setting)]
    words: dict[str, tuple[object, ...]] = {
        "pairs": (
            "--teacher",
            made / "teacher",
            "--count",
            2,
            *one_step[:2],
            "--guidance-scale",
            1,
            "--out",
            out,
        ),
        "distill": ("pocket-regression", "--pairs", made / "pairs", "--out", out, *sets),
        "export": (made / "run", "--out", out / "export"),
        "evaluate": (made / "teacher", "--count", 2, *one_step, "--out", out / "metrics.json"),
        "generate": (made / "teacher", *one_step, "--prompt", "a star", "--out", out / "grid.png"),
    }
    return [command, *map(str, words[command])]


def isolated() -> list[str]:
    """How a command gets mounts of its own here. Skips where that is not allowed."""
    for options in ("-m", "-rm"):  # as root; as anybody, where users may have name spaces
        if shutil.which("unshare"):
            words = ["unshare", options, *MOUNT, "/mnt", "true"]
            if subprocess.run(words, capture_output=True).returncode == 0:
                return ["unshare", options]
    pytest.skip("no private mounts here (unshare -m, as root or in a user name space)")


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_disk(command: str, made: Path, tmp_path: Path) -> None:
    before, out = everything(made), tmp_path / "out"
    out.mkdir()
    ran = subprocess.run(
        [
            *isolated(),
            *MOUNT,
            str(out),
            sys.executable,
            "-m",
            "diffusion2gan",
            *argv(command, made, out),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert (
        last.startswith("error: ")
        and "Read-only file system" in last
        and str(out) in last
        and "--out" in last
    )
    assert everything(made) == before and [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_where_a_folder_should_be(
    command: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("mine")
    before = everything(made)
    monkeypatch.setattr(
        sys, "argv", ["diffusion2gan", *argv(command, made, tmp_path / "file" / "below")]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and last.startswith("error: ") and "file" in last and "--out" in last
    assert everything(made) == before and everything(tmp_path) == {"file": b"mine"}


def test_safetensors_own_words_are_an_error_of_the_system(tmp_path: Path) -> None:
    """It raises an error of its own, of words alone: here of a name that is too long with what `whole` adds."""
    path = tmp_path / ("x" * 250)
    with pytest.raises(SafetensorError, match="os error 36"):
        save_file({}, path.with_name(f"{path.name}.too.long"))
    with pytest.raises(OSError, match=r"File name too long.*xxx") as told:
        checkpoint.save(path, {}, {})
    assert told.value.errno == errno.ENAMETOOLONG and list(tmp_path.iterdir()) == []
