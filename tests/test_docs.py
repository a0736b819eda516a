"""The documents are true: every snippet runs, every link leads somewhere, every file and target named exists.

The blocks of one document run in order in one temporary folder, `bash` and `console` with this environment's commands
on PATH, `python` each in a process of its own. A comment on the line above a block says otherwise:

    <!-- not run: REASON -->    skipped
    <!-- slow -->               run by .ci/run only
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from diffusion2gan.cli import app
from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import load_recipe

ROOT = Path(__file__).parents[1]
NAMED = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
DOCUMENTS = [path for path in [*NAMED, *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
SHELL, RUN = ("bash", "console"), ("bash", "console", "python")
NOT_RUN_BY_ANOTHER_NAME = {"sh", "shell", "zsh", "shell-session", "py", "python3", "pycon"}
FENCE = re.compile(
    r"(?P<comments>(?:^[ ]*<!--.*?-->[ ]*\n\s*)*)"
    r"^(?P<indent>[ ]*)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=\"([^\"]+)\"")
MAKE = re.compile(r"(?:^|&&|;)\s*(?:\$ )?make[ \t]+([a-z]+)", re.M)
PATH = re.compile(r"(?:src|tests|docs|recipes|benchmarks|examples)/[\w./*-]+|[a-z]+/[\w/]+\.py")


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    code: str
    comments: tuple[str, ...]

    @property
    def slow(self) -> bool:
        return "slow" in self.comments

    @property
    def not_run(self) -> str | None:
        """The reason given, or None where the block is to run."""
        reasons = [
            c.removeprefix("not run").lstrip(":").strip()
            for c in self.comments
            if c.startswith("not run")
        ]
        return reasons[0] if reasons else None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks_of(document: Path, text: str) -> list[Block]:
    return [
        Block(
            document,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            textwrap.dedent(match["code"]),
            tuple(c.strip() for c in re.findall(r"<!--(.*?)-->", match["comments"], re.S)),
        )
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> str:
    """The script of a shell block; of a `console` one, the lines after `$ ` and their continuations after `> `."""
    if block.language == "bash":
        return block.code
    lines, continued = [], False
    for line in block.code.splitlines():
        if line.startswith("$ ") or continued:
            lines.append(line.removeprefix("$ ").removeprefix("> "))
            continued = line.endswith("\\")
    return "\n".join(lines)


def run(block: Block, folder: Path) -> None:
    if block.language == "python":
        command = [sys.executable, "-c", block.code]
    else:
        command = ["bash", "-euo", "pipefail", "-c", commands(block)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=3600 if block.slow else 300,
    )
    assert done.returncode == 0, (
        f"{block}\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )


class Reader:
    """Somebody who reads a document from its start: a block finds what those before it have left."""

    def __init__(self, document: Path, folder: Path) -> None:
        self.folder = folder
        self.waiting = [b for b in BLOCKS if b.document == document and b.not_run is None]

    def reach(self, block: Block) -> None:
        """Runs `block` and what comes before it and has not run yet (slow ones only for a slow one)."""
        if block not in self.waiting:
            raise AssertionError(
                f"{block} has run before, for a later block, and failed there or here"
            )
        before = self.waiting[: self.waiting.index(block)]
        for each in [*(b for b in before if block.slow or not b.slow), block]:
            self.waiting.remove(each)
            run(each, self.folder)


ALL_BLOCKS = [
    block for document in DOCUMENTS for block in blocks_of(document, document.read_text("utf-8"))
]
BLOCKS = [block for block in ALL_BLOCKS if block.language in RUN]


PARAMETERS = [
    pytest.param(b, marks=[pytest.mark.slow] if b.slow else [], id=str(b)) for b in BLOCKS
]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Reader]:
    return {
        document: Reader(document, tmp_path_factory.mktemp(document.stem)) for document in DOCUMENTS
    }


@pytest.mark.parametrize("block", PARAMETERS)
def test_snippet_runs(block: Block, readers: dict[Path, Reader]) -> None:
    if block.not_run is not None:
        assert block.not_run, f"{block}: say why it is not run: <!-- not run: REASON -->"
        pytest.skip(block.not_run)
    readers[block.document].reach(block)


USAGE = typer.BadParameter.__mro__[1]  # what the command line raises at words it does not know
STUB = """#!{python}
import json, os, sys
name, *argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.environ["SAID"], "a") as file:
    print(json.dumps([name, *argv]), file=file)
"""


def said(document: Path, folder: Path) -> list[list[str]]:
    """The commands of a document's blocks that are not run, as bash calls them: nothing but their words is kept."""
    names = (
        "diffusion2gan",
        "torchrun",
        "python",
        "make",
        "git",
        "pip",
        "open",
        "cp",
        "mkdir",
        ".venv/bin/python",
    )
    for name in names:
        stub = folder / "bin" / Path(name).name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)
    (folder / "said").touch()
    blocks = [
        b
        for b in BLOCKS
        if b.document == document and b.not_run is not None and b.language in SHELL
    ]
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "SAID": str(folder / "said")}
    script = "\n".join(commands(b) for b in blocks)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{document}: {done.stderr}"
    return [json.loads(line) for line in (folder / "said").read_text().splitlines()]


def check_command(argv: list[str]) -> None:
    """The verb, every option and its value, a recipe and its settings, or a benchmark's: all exist.

    Under torchrun a recipe's batch is cut over the ranks. Nothing runs but `plan`, which is arithmetic.
    """
    world = ranks_of(argv) if argv[0] == "torchrun" else 1
    if argv[0] == "torchrun":
        argv = ["diffusion2gan", *argv[argv.index("diffusion2gan") + 1 :]]
    if argv[0] == "python" and argv[1].endswith(".py"):
        told = (ROOT / argv[1]).read_text("utf-8")
        missing = [word for word in argv[2:] if word.startswith("--") and f'"{word}"' not in told]
        assert not missing, f"{argv}: no {missing}"
    if argv[0] != "diffusion2gan":
        return
    command: Any = typer.main.get_command(app)
    words, name = (
        [word for word in argv[1:] if word != "…"],
        "",
    )  # an ellipsis stands for options told elsewhere
    while words and words[0] in getattr(command, "commands", {}):
        command, name, words = command.commands[words[0]], words[0], words[1:]
    assert name, f"{argv}: no such command"
    context = command.make_context(name, list(words))
    if name == "distill":
        check_ranks(load_recipe(context.params["recipe"], context.params["set_"] or []), world)
    if name == "plan":
        with context:
            command.invoke(context)


def ranks_of(argv: list[str]) -> int:
    """torchrun's --nnodes times --nproc-per-node."""
    given = [
        int(argv[argv.index(word) + 1]) for word in ("--nnodes", "--nproc-per-node") if word in argv
    ]
    return math.prod(given)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_are_not_run_exist(document: Path, tmp_path: Path) -> None:
    for argv in said(document, tmp_path):
        try:
            check_command(argv)
        except (USAGE, UserError) as error:
            raise AssertionError(f"{document.name}: {' '.join(argv)}: {error}") from error


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_plans_in_the_text_run(document: Path) -> None:
    for span in spans(document.read_text("utf-8")):
        if span.startswith("diffusion2gan plan "):
            check_command(span.split())


def test_reproduce_measures_every_row_of_its_tables(tmp_path: Path) -> None:
    """As many systems are measured as rows wait for a number of ours, the benchmarks' five aside."""
    document = ROOT / "docs" / "reproduce.md"
    waiting = document.read_text("utf-8").count("| not measured here |")
    made = {tuple(argv) for argv in said(document, tmp_path) if argv[1] == "evaluate"}
    assert len(made) == waiting - 5 == 22


def test_commands_that_do_not_exist_are_found() -> None:
    check_command(["diffusion2gan", "evaluate", "x", "--seed", "3"])
    for wrong, told in (
        ("diffusion2gan evalute x", AssertionError),
        ("diffusion2gan evaluate x --sede 3", USAGE),
        ("diffusion2gan evaluate x --seed three", USAGE),
        ("diffusion2gan compare", USAGE),
        ("diffusion2gan distill sd16 --pairs p --out o", UserError),
        ("diffusion2gan distill sd15 --pairs p --out o --set los=mse", UserError),
        ("python benchmarks/loss_cost.py --sise sd15", AssertionError),
        ("torchrun --nproc-per-node 8 -m diffusion2gan pairs --cont 3", USAGE),
        ("torchrun --nproc-per-node 8 -m diffusion2gan distill sdxl --pairs p --out o", UserError),
        (
            "torchrun --nnodes 8 --nproc-per-node 8 -m diffusion2gan distill sd15 --pairs p --out o",
            UserError,
        ),
        ("diffusion2gan distill sdxl --set strategy=fsdp --pairs p --out o", UserError),
        ("diffusion2gan plan sd15 --gpus 3", UserError),
        ("diffusion2gan plan flux-lora", UserError),
    ):
        with pytest.raises(told):
            check_command(wrong.split())


def test_there_is_a_readme() -> None:
    assert (ROOT / "README.md").is_file()


def code_free(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def spans(text: str) -> list[str]:
    """What stands in backticks outside the blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
class TestDocument:
    def test_no_snippet_hides_behind_another_name(self, document: Path) -> None:
        hidden = [
            str(b)
            for b in ALL_BLOCKS
            if b.document == document and b.language in NOT_RUN_BY_ANOTHER_NAME
        ]
        assert not hidden, f"call these blocks one of {RUN}, so that they are run: {hidden}"

    def test_links_lead_somewhere(self, document: Path) -> None:
        targets = ["".join(found) for found in LINK.findall(code_free(document.read_text("utf-8")))]
        near = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
        missing = [t for t in near if not (document.parent / t).exists()]
        assert not missing, f"{document.name} links to {missing}"

    def test_make_targets_exist(self, document: Path) -> None:
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
        text = document.read_text("utf-8")
        shell = [commands(b) for b in ALL_BLOCKS if b.document == document and b.language in SHELL]
        named = {name for code in [*shell, *spans(text)] for name in MAKE.findall(code)}
        assert named <= targets, f"{document.name} names make {named - targets}"

    def test_files_named_exist(self, document: Path) -> None:
        named = [span for span in spans(document.read_text("utf-8")) if PATH.fullmatch(span)]
        missing = [
            n
            for n in named
            if not any(any(base.glob(n.rstrip("/"))) for base in (ROOT, ROOT / "src/diffusion2gan"))
        ]
        assert not missing, f"{document.name} names {missing}"


def test_blocks_are_read_as_meant() -> None:
    fence = "`" * 3
    text = (
        f"a\n<!-- slow -->\n{fence}bash\nls\n{fence}\n\n<!-- not run: needs a GPU -->\n\n{fence}console\n"
        f"$ one \\\n> two\noutput\n$ three\n{fence}\n- item\n  {fence}python title=x\n  import os\n  {fence}\n"
        f"<!-- not run -->\n{fence}bash\n{fence}\n"
    )
    first, second, third, fourth = blocks_of(ROOT / "x.md", text)
    assert (first.slow, first.not_run, first.line, first.code) == (True, None, 3, "ls\n")
    assert (second.not_run, commands(second)) == ("needs a GPU", "one \\\ntwo\nthree")
    assert (third.language, third.code, third.comments) == ("python", "import os\n", ())
    assert (fourth.not_run, fourth.code) == ("", "")
