"""The documents are true: snippets run, commands and settings exist, links and files resolve.

The blocks of one document run in order in one temporary folder, `bash` and `console` with this
environment's commands on PATH, each `python` block in its own process. A comment on the line above
a block changes that:

    <!-- not run: REASON -->    not run; its commands are still parsed
    <!-- slow -->               run by .ci/run only
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from cli.runner import run

from diffusion2gan.cli import app
from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.distill.health import REMEDIES
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
NAMED = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
DOCUMENTS = [*NAMED, *sorted((ROOT / "docs").rglob("*.md"))]
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
SETTING = re.compile(r"([a-z][a-z0-9_]+) ?= ?\S+")
OPTION = re.compile(r"--[a-z][a-z0-9-]+")

# Names in `name = value` that are no recipe settings: arguments of diffusers and of our classes.
ARGUMENTS = {
    "fullgraph",
    "guidance_scale",
    "num_inference_steps",
    "original_inference_steps",
    "strict",
    "target_grad",
    "variant",
    "vae",
    "weights_only",
}
# Options of other programs: torchrun, pip, hf.
OTHER_OPTIONS = {"--max-restarts", "--nnodes", "--nproc-per-node", "--revision", "--help"}


def document_id(document: Path) -> str:
    return str(document.relative_to(ROOT))


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
        """The reason given, or None if the block is to run."""
        for comment in self.comments:
            if comment.startswith("not run"):
                return comment.removeprefix("not run").lstrip(":").strip()
        return None

    def __str__(self) -> str:
        return f"{document_id(self.document)}:{self.line}"


def parse_blocks(document: Path, text: str) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        comments = re.findall(r"<!--(.*?)-->", match["comments"], re.S)
        blocks.append(
            Block(
                document,
                line,
                match["language"],
                textwrap.dedent(match["code"]),
                tuple(comment.strip() for comment in comments),
            )
        )
    return blocks


def shell_script(block: Block) -> str:
    """The commands of a shell block.

    In a `console` block these are the lines after `$ ` and their continuations after `> `.
    """
    if block.language == "bash":
        return block.code
    lines, continued = [], False
    for line in block.code.splitlines():
        if line.startswith("$ ") or continued:
            lines.append(line.removeprefix("$ ").removeprefix("> "))
            continued = line.endswith("\\")
    return "\n".join(lines)


def run_block(block: Block, folder: Path) -> None:
    if block.language == "python":
        command = [sys.executable, "-c", block.code]
    else:
        command = ["bash", "-euo", "pipefail", "-c", shell_script(block)]
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
    output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, f"{block}\n{block.code}\n{output}"


class Reader:
    """Runs a document's blocks from its start: a block finds the files of earlier ones."""

    def __init__(self, document: Path, folder: Path) -> None:
        self.folder = folder
        self.waiting = [block for block in runnable_blocks(document) if block.not_run is None]

    def run_up_to(self, block: Block) -> None:
        """Runs `block` and the blocks before it that have not run (slow ones for a slow one)."""
        if block not in self.waiting:
            raise AssertionError(f"{block} has run before, for a later block; see that failure")
        for earlier in self.waiting[: self.waiting.index(block)]:
            if block.slow or not earlier.slow:
                self.waiting.remove(earlier)
                run_block(earlier, self.folder)
        self.waiting.remove(block)
        run_block(block, self.folder)


BLOCKS = {document: parse_blocks(document, document.read_text("utf-8")) for document in DOCUMENTS}


def runnable_blocks(document: Path) -> list[Block]:
    """The blocks in a language that is run, also those marked `not run`."""
    return [block for block in BLOCKS[document] if block.language in RUN]


def shell_scripts(document: Path, *, not_run_only: bool = False) -> list[str]:
    scripts = []
    for block in runnable_blocks(document):
        if block.language in SHELL and (block.not_run is not None or not not_run_only):
            scripts.append(shell_script(block))
    return scripts


def block_parameters() -> Iterator[Any]:
    for document in DOCUMENTS:
        for block in runnable_blocks(document):
            marks = [pytest.mark.slow] if block.slow else []
            yield pytest.param(block, marks=marks, id=str(block))


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Reader]:
    """A reader, and a temporary folder, per document."""
    readers = {}
    for document in DOCUMENTS:
        readers[document] = Reader(document, tmp_path_factory.mktemp(document.stem))
    return readers


@pytest.mark.parametrize("block", list(block_parameters()))
def test_snippet_runs(block: Block, readers: dict[Path, Reader]) -> None:
    if block.not_run is not None:
        assert block.not_run, f"{block}: give a reason: <!-- not run: REASON -->"
        pytest.skip(block.not_run)
    readers[block.document].run_up_to(block)


# Commands that are not run

USAGE_ERROR = typer.BadParameter.__mro__[1]  # raised by the command line at unknown words
STUBBED = (
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
STUB = """#!{python}
import json, os, sys
name, *argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.environ["RECORD"], "a") as file:
    print(json.dumps([name, *argv]), file=file)
"""


def record_commands(document: Path, folder: Path) -> list[list[str]]:
    """The commands of a document's blocks that are not run, as bash would call them.

    Programs are replaced by stubs that record their arguments, so loops and functions are expanded.
    """
    for name in STUBBED:
        stub = folder / "bin" / Path(name).name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)

    # Files that the blocks read
    (folder / "record").touch()
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv" / "bin" / "activate").touch()

    scripts = shell_scripts(document, not_run_only=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(scripts)],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "RECORD": str(folder / "record")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{document}: {done.stderr}"
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def check_command(argv: list[str]) -> None:
    """A command, its options and their values, a recipe and its settings: all exist.

    Under torchrun a recipe's batch must be divisible over the ranks. Only `plan` is run: it is
    arithmetic.
    """
    world_size = torchrun_world_size(argv) if argv[0] == "torchrun" else 1
    if argv[0] == "torchrun":
        argv = ["diffusion2gan", *argv[argv.index("diffusion2gan") + 1 :]]
    if argv[0] == "python" and argv[1].endswith(".py"):
        source = (ROOT / argv[1]).read_text("utf-8")
        missing = [word for word in argv[2:] if word.startswith("--") and f'"{word}"' not in source]
        assert not missing, f"{argv}: no {missing}"

    if argv[0] == "pip":
        check_extras(argv)
    if argv[0] != "diffusion2gan":
        return

    # Find the command; an ellipsis stands for options given elsewhere
    command: Any = typer.main.get_command(app)
    words, name = [word for word in argv[1:] if word != "…"], ""
    while words and words[0] in getattr(command, "commands", {}):
        command, name, words = command.commands[words[0]], words[0], words[1:]
    assert name, f"{argv}: no such command"

    # Parse its options, then what they name
    context = command.make_context(name, list(words))
    if name == "distill":
        recipe = load_recipe(context.params["recipe"], context.params["set_"] or [])
        check_ranks(recipe, world_size)
    if name == "plan":
        with context:
            command.invoke(context)


def torchrun_world_size(argv: list[str]) -> int:
    """--nnodes times --nproc-per-node."""
    world_size = 1
    for word in ("--nnodes", "--nproc-per-node"):
        if word in argv:
            world_size *= int(argv[argv.index(word) + 1])
    return world_size


def check_extras(argv: list[str]) -> None:
    """The extras that `pip install '.[…]'` names exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in argv:
        if match := re.fullmatch(r"[^\[]*\[([\w,]+)\]", word):
            unknown = set(match[1].split(",")) - set(project["optional-dependencies"])
            assert not unknown, f"{argv}: no extra {unknown}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_commands_that_are_not_run_exist(document: Path, tmp_path: Path) -> None:
    for argv in record_commands(document, tmp_path):
        try:
            check_command(argv)
        except (USAGE_ERROR, UserError) as error:
            raise AssertionError(f"{document.name}: {' '.join(argv)}: {error}") from error


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_plans_in_the_text_run(document: Path) -> None:
    for span in code_spans(document.read_text("utf-8")):
        if span.startswith("diffusion2gan plan "):
            check_command(span.split())


def test_reproduce_measures_every_row_of_its_tables(tmp_path: Path) -> None:
    """One evaluate command for each row without a number, except the five of the benchmarks."""
    document = ROOT / "docs" / "reproduce.md"
    waiting = document.read_text("utf-8").count("| not measured here |")
    recorded = record_commands(document, tmp_path)
    evaluations = {tuple(argv) for argv in recorded if argv[1] == "evaluate"}
    assert len(evaluations) == waiting - 5 == 22


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("diffusion2gan evalute x", AssertionError),
        ("diffusion2gan evaluate x --sede 3", USAGE_ERROR),
        ("diffusion2gan evaluate x --seed three", USAGE_ERROR),
        ("diffusion2gan compare", USAGE_ERROR),
        ("diffusion2gan distill sd16 --pairs p --out o", UserError),
        ("diffusion2gan distill sd15 --pairs p --out o --set los=mse", UserError),
        ("python benchmarks/loss_cost.py --sise sd15", AssertionError),
        ("pip install diffusion2gan[lorra]", AssertionError),
        ("torchrun --nproc-per-node 8 -m diffusion2gan pairs --cont 3", USAGE_ERROR),
        ("torchrun --nproc-per-node 8 -m diffusion2gan distill sdxl --pairs p --out o", UserError),
        (
            "torchrun --nnodes 8 --nproc-per-node 8 -m diffusion2gan distill sd15 "
            "--pairs p --out o",
            UserError,
        ),
        ("diffusion2gan distill sdxl --set strategy=fsdp --pairs p --out o", UserError),
        ("diffusion2gan plan sd15 --gpus 3", UserError),
        ("diffusion2gan plan flux-lora", UserError),
    ],
)
def test_wrong_commands_are_noticed(command: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_command(command.split())


def test_a_right_command_passes() -> None:
    check_command(["diffusion2gan", "evaluate", "x", "--seed", "3"])


# The README

TINY_RUN = [
    "--set=total_pairs=8",
    "--set=batch_size=4",
    "--set=gradient_accumulation_steps=2",
    "--set=lora_rank=4",
    "--set=device=cpu",
    "--set=precision=float32",
]


@pytest.mark.slow
def test_your_own_model_in_five_lines_works(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The README's five lines on a tiny random Stable Diffusion pipeline, on the CPU, shorter."""
    pytest.importorskip("peft", reason="the README's recipe trains a LoRA")
    (tmp_path / "my-model").symlink_to(family_folder("sd15"))
    (tmp_path / "prompts.txt").write_text("a red star\na blue moon\n")
    commands = [
        argv for argv in record_commands(ROOT / "README.md", tmp_path) if argv[0] == "diffusion2gan"
    ]
    verbs = [argv[1] for argv in commands]
    assert verbs == ["pairs", "distill", "export", "generate", "compare"]

    # On the CPU, with few pairs and few updates
    for argv in commands:
        words = [{"cuda": "cpu", "100000": "8"}.get(word, word) for word in argv[1:]]
        if words[0] == "distill":
            words += TINY_RUN
        if words[0] == "pairs":
            words += ["--num-inference-steps", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "diffusion2gan", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / "lighthouse.png").is_file()
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux_dev"])
def test_page_of_your_own_model_runs_from_top_to_bottom(
    family: str,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its commands on tiny random pipelines of three classes, with few pairs and few updates.

    `distill` is run with the recipe and the settings that `pairs` printed.
    """
    pytest.importorskip("peft", reason="the page's recipes train a LoRA")
    commands = record_commands(ROOT / "docs" / "models" / "index.md", tmp_path)
    verbs = " ".join(argv[1] for argv in commands)
    assert verbs == "pairs distill pairs pairs distill export generate evaluate compare export"

    # The user's files. A tiny FLUX pipeline has no size of its own but the default 1024 pixels.
    (tmp_path / "my-model").symlink_to(family_folder(family))
    (tmp_path / "prompts.txt").write_text("".join(f"a red star, number {i}\n" for i in range(8)))
    monkeypatch.chdir(tmp_path)
    resolution = ["--resolution", "64"] if family == "flux_dev" else []
    recipe = {"sd15": "sd15-lora-24gb", "sdxl": "sdxl-lora-24gb", "flux_dev": "flux-lora"}[family]

    printed_settings: list[str] = []
    for _, verb, *words in commands:
        words = [{"100000": "8", "1000": "6"}.get(word, word) for word in words]
        if verb == "pairs" and words[0] != "verify":
            words += ["--num-inference-steps", "2", *resolution]
        if verb == "distill":
            words = [recipe, *words[1:], *printed_settings, *TINY_RUN]
        if verb == "compare" and resolution:
            words = [word.replace("teacher=my-model", "teacher=my-model@64px") for word in words]

        result = run(verb, *words)
        assert result.code == 0, f"{verb} {words}\n{result.out[-2000:]}\n{result.err[-4000:]}"
        if "Next: " in result.out:
            _, _, *printed = shlex.split(result.out.partition("Next: ")[2])
            if verb == "pairs":
                assert printed[0] == recipe
                printed_settings = printed[1 : printed.index("--pairs")]

    # The student beside its teacher, and on its card
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["count"] == 6 and "frechet_distance_to_teacher" in metrics["intervals"]
    card = (tmp_path / "export" / "mine" / "README.md").read_text().replace("\\_", "_")
    assert f"same_noise_distance {metrics['same_noise_distance']:.4g}" in card
    assert "Fréchet distance to the teacher" in (tmp_path / "report" / "report.md").read_text()


def test_the_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text and "make test" in text


def test_the_readme_quotes_the_measured_numbers() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    results = json.loads((ROOT / "docs/results/pocket_world.json").read_text("utf-8"))
    for name in ("teacher", "student"):
        measured = results[name]
        low, high = measured["intervals"]["frechet_distance"]
        assert f"{measured['frechet_distance']:.2f} [{low:.2f}, {high:.2f}]" in text
        low, high = measured["intervals"]["attribute_accuracy"]
        share = f"{measured['attribute_accuracy']:.1%}".replace("%", " %")
        assert f"{share} [{100 * low:.1f}, {100 * high:.1f}]" in text
        assert f"{measured['seconds_per_image']:.3f}" in text
    ratio = results["student"]["frechet_distance"] / results["teacher"]["frechet_distance"]
    assert f"{ratio:.2f} ×" in text and "GPU: not measured" in text


def test_the_training_guide_explains_every_warning() -> None:
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    assert all(f"| {name} |" in text for name in REMEDIES)


# Text outside the blocks


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def code_spans(text: str) -> list[str]:
    """The spans in backticks outside the blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def command_options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from [*parameter.opts, *parameter.secondary_opts]
    for child in getattr(command, "commands", {}).values():
        yield from command_options(child)


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
class TestDocument:
    def test_every_snippet_has_a_language_that_is_run(self, document: Path) -> None:
        hidden = []
        for block in BLOCKS[document]:
            if block.language in NOT_RUN_BY_ANOTHER_NAME:
                hidden.append(str(block))
        assert not hidden, f"use one of {RUN} for these blocks, so that they are run: {hidden}"

    def test_links_resolve(self, document: Path) -> None:
        missing = []
        for groups in LINK.findall(without_code(document.read_text("utf-8"))):
            target = "".join(groups)
            is_local = not re.match(r"[a-z]+:|#", target)
            if is_local and not (document.parent / target.split("#")[0]).exists():
                missing.append(target)
        assert not missing, f"{document.name} links to {missing}"

    def test_make_targets_exist(self, document: Path) -> None:
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
        named = set()
        for code in [*shell_scripts(document), *code_spans(document.read_text("utf-8"))]:
            named |= set(MAKE.findall(code))
        assert named <= targets, f"{document.name} names make {named - targets}"

    def test_files_named_exist(self, document: Path) -> None:
        missing = []
        for span in code_spans(document.read_text("utf-8")):
            if PATH.fullmatch(span):
                pattern = span.rstrip("/")
                found = [*ROOT.glob(pattern), *(ROOT / "src/diffusion2gan").glob(pattern)]
                if not found:
                    missing.append(span)
        assert not missing, f"{document.name} names {missing}"

    def test_options_named_exist(self, document: Path) -> None:
        known = {*command_options(typer.main.get_command(app)), *OTHER_OPTIONS}
        named: set[str] = set()
        for span in code_spans(document.read_text("utf-8")):
            if span.startswith("--"):
                named |= set(OPTION.findall(span))
        assert named <= known, f"{document.name} names options that do not exist: {named - known}"

    def test_settings_named_exist(self, document: Path) -> None:
        named = set()
        for span in code_spans(document.read_text("utf-8")):
            if match := SETTING.fullmatch(span):
                named.add(match[1])
        unknown = named - set(Recipe.model_fields) - ARGUMENTS
        assert not unknown, f"{document.name} names settings that do not exist: {unknown}"


def test_blocks_are_parsed_with_their_comments() -> None:
    fence = "`" * 3
    text = (
        f"a\n<!-- slow -->\n{fence}bash\nls\n{fence}\n\n<!-- not run: needs a GPU -->\n\n"
        f"{fence}console\n$ one \\\n> two\noutput\n$ three\n{fence}\n"
        f"- item\n  {fence}python title=x\n  import os\n  {fence}\n"
        f"<!-- not run -->\n{fence}bash\n{fence}\n"
    )
    first, second, third, fourth = parse_blocks(ROOT / "x.md", text)
    assert (first.slow, first.not_run, first.line, first.code) == (True, None, 3, "ls\n")
    assert (second.not_run, shell_script(second)) == ("needs a GPU", "one \\\ntwo\nthree")
    assert (third.language, third.code, third.comments) == ("python", "import os\n", ())
    assert (fourth.not_run, fourth.code) == ("", "")


# The site


@pytest.fixture(scope="module")
def generate() -> Any:
    """The MkDocs hook docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_name_every_option_and_setting(generate: Any) -> None:
    commands = generate.command_reference()
    for option in set(command_options(typer.main.get_command(app))):
        assert not option.startswith("--") or option == "--help" or f"`{option}`" in commands
    settings = generate.setting_reference()
    assert all(f"| `{name}` |" in settings for name in Recipe.model_fields)


def test_markers_of_generated_sections_are_replaced(generate: Any) -> None:
    for name in ("cli", "recipe"):
        text = (ROOT / "docs" / "reference" / f"{name}.md").read_text("utf-8")
        filled = generate.on_page_markdown(text)
        assert "<!-- generated" in text and "<!-- generated" not in filled
        assert len(filled) > 2 * len(text)


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    """Strict: every link, anchor and navigation entry resolves. Nothing it loads is remote."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    # No script, style, image or frame comes from another host
    remote = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?https?:")
    for page in (tmp_path / "site").rglob("*.html"):
        assert not remote.search(page.read_text("utf-8")), f"{page} loads a remote file"
    for style in (tmp_path / "site").rglob("*.css"):
        assert "url(http" not in style.read_text("utf-8"), f"{style} loads a remote file"
