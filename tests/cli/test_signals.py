"""Signals while a command starts end it at once, with 130 and without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_with_module(folder: Path, name: str, content: str, *arguments: str) -> tuple[int, str]:
    """Runs the command line with a module `name` of this content before all others."""
    (folder / f"{name}.py").write_text(content)
    environment = os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    done = subprocess.run(
        [sys.executable, "-m", "diffusion2gan", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ["--help"]),  # while the command line is imported
        ("numpy", ["pairs", "--out", "set"]),  # while a command imports its libraries
    ],
)
def test_signal_during_an_import_ends_quietly(
    module: str, arguments: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    # Libraries in C turn an exception during their import into an error of their own
    content = (
        "import os\ntry:\n"
        f"    os.kill(os.getpid(), {int(number)})\n    sum(range(1000))\n"
        "except BaseException as error:\n    raise ImportError('a part failed') from error\n"
        "raise RuntimeError('went on')\n"
    )
    assert run_with_module(tmp_path, module, content, *arguments) == (130, "")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_outside_of_an_import_is_a_keyboard_interrupt(
    number: signal.Signals, tmp_path: Path
) -> None:
    """So that files are closed and locks are released."""
    program = (
        "import os, sys\nfrom diffusion2gan import cli, recipe\n"
        "def read():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    finally:\n"
        "        print('closed')\n"
        "recipe.shipped_recipes = read\n"
        "sys.argv = ['x', 'recipe', 'list']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 130 and done.stdout == "closed\n"
    assert "Traceback" not in done.stderr


def test_path_that_is_not_utf8_is_one_message(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    command = [sys.executable, "-m", "diffusion2gan", "pairs", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the argument ") and "caf\\udce9" in done.stderr
    assert done.stderr.count("\n") == 1 and "not valid UTF-8" in done.stderr
    assert os.listdir(folder) == []
