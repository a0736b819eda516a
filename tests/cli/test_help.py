"""Help, version, shell completion and exit codes of every command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from cli.runner import Result, assert_refused, run

import diffusion2gan
from diffusion2gan.cli import app


def command_paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """`()`, `("pairs",)`, `("pairs", "info")`, … for every command and group."""
    yield path
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from command_paths(subcommand, (*path, name))


COMMANDS = list(command_paths(typer.main.get_command(app)))


def test_every_command_is_listed() -> None:
    names = {" ".join(path) for path in COMMANDS}
    assert len(COMMANDS) == len(names) == 27
    assert {"", "pairs", "pairs info", "recipe list", "recipe show", "distill", "plan"} <= names


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_under_both_names(path: tuple[str, ...]) -> None:
    short, long = run(*path, "-h"), run(*path, "--help")
    assert short == long
    assert short.code == 0 and short.err == ""
    assert short.out.startswith("Usage: ") and "-h, --help" in short.out

    # One style: the first sentence of the help is an imperative one and ends with a full stop.
    description = short.out.split("\n\n")[1].strip()
    assert description[0].isupper() and description.endswith("."), description


def test_help_of_every_command_loads_no_heavy_library() -> None:
    """All of it in one process in which none of these libraries can be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "from diffusion2gan.cli import main\n"
        f"for path in {COMMANDS!r}:\n"
        "    sys.argv = ['diffusion2gan', *path, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as e: print('CODE', e.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("CODE 0") == done.stdout.count("Usage: ") == len(COMMANDS)


def test_distill_help_names_the_recipe_commands() -> None:
    text = " ".join(run("distill", "--help").out.split())
    assert "diffusion2gan recipe list" in text
    assert "diffusion2gan recipe show NAME" in text


def test_version_is_the_package_version() -> None:
    assert run("--version") == Result(0, f"diffusion2gan {diffusion2gan.__version__}\n", "")


def test_no_command_prints_the_help() -> None:
    result = run()
    assert "Usage: " in result.out + result.err and "distill" in result.out + result.err


def shell(command: str, **environment: str) -> str:
    """The output of a bash command line that finds this checkout's `diffusion2gan`."""
    scripts = Path(sys.executable).parent
    # The completion commands take the shell that is named, not the one that runs the tests
    settings = {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_show_completion_prints_a_script() -> None:
    script = shell("diffusion2gan --show-completion bash")
    assert "complete -o default -F _diffusion2gan_completion diffusion2gan" in script


def test_install_completion_writes_into_the_home_folder(tmp_path: Path) -> None:
    shell("diffusion2gan --install-completion bash", HOME=str(tmp_path))
    script = tmp_path / ".bash_completions" / "diffusion2gan.sh"
    assert "_diffusion2gan_completion" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("words", "index", "expected"),
    [
        ("diffusion2gan rec", 1, ["recipe"]),
        ("diffusion2gan recipe ", 2, ["list", "show"]),
        ("diffusion2gan distill --dry", 2, ["--dry-run"]),
    ],
)
def test_completion_suggests_commands_and_options(
    words: str, index: int, expected: list[str]
) -> None:
    suggestions = shell(
        "diffusion2gan",
        _DIFFUSION2GAN_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(index),
    )
    assert suggestions.split() == expected


def test_a_process_exits_with_the_code_of_its_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffusion2gan", "distil"], capture_output=True, text=True
    )
    assert_refused(Result(done.returncode, done.stdout, done.stderr), 2, "'distill'")
