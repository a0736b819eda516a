"""Rules of the code base: imports go one way, heavy libraries load late, nothing unsafe is loaded.

Each rule is a function that finds violations; each has a test that it finds a planted one.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "diffusion2gan"
FILES = sorted(SRC.rglob("*.py"))

# A "room" is a top-level module or folder. A room imports rooms of its level or below, and no two
# rooms import each other.
LEVEL = {
    "callable_module": 0,
    "errors": 0,
    "assets": 1,
    "noise": 1,
    "prompts": 1,
    "recipe": 1,
    "runtime": 1,
    "teacher": 2,
    "adversarial": 3,
    "pairs": 3,
    "perceptual": 3,
    "pipelines": 3,
    "pocket": 4,
    "distill": 5,
    "generate": 5,
    "cost": 6,
    "evaluate": 6,
    "single_file": 5,
    "model_card": 5,
    "export": 6,
    "compare": 7,
    "serve": 8,
    "api": 9,
    "demo": 9,
    "cli": 10,
    "__main__": 11,
}

# These may import everything. `__init__` is the public API.
TOP = {"api", "demo", "cli", "__main__", "__init__"}

# Jobs read each other's files, not each other's code.
JOBS = {
    "pairs.make",
    "distill.train",
    "export",
    "evaluate.run",
    "compare.compare",
    "serve.app",
    "perceptual.fit",
    "perceptual.calibrate",
    "perceptual.distil",
}

POCKET_USERS = {"pocket", "evaluate", "compare", "serve"} | TOP
DIFFUSERS_USERS = ("teacher.", "pocket.", "pipelines.", "export")
HEAVY = ("torch", "diffusers", "transformers")
CLI_IMPORTS = {"typer", "diffusion2gan"}  # at the top of a cli module, beside the standard library


# Imports


def module_name(file: Path) -> str:
    """`teacher/ode.py` → "teacher.ode"; a package's `__init__.py` → "teacher.__init__"."""
    return ".".join(file.relative_to(SRC).with_suffix("").parts)


MODULES = {module_name(file) for file in FILES}


def room(module: str) -> str:
    return module.split(".")[0]


def imported_names(tree: ast.AST, module: str) -> Iterator[str]:
    """Every dotted name that `module` imports, anywhere in it, relative imports made absolute."""
    package = ["diffusion2gan", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            if node.module:
                base = [*base, node.module]
            for alias in node.names:
                yield ".".join([*base, alias.name])


def imported_modules(tree: ast.AST, module: str) -> set[str]:
    """The modules of this package that `module` imports, named as `module_name` does."""
    found = set()
    for name in imported_names(tree, module):
        package, *parts = name.split(".")
        if package == "diffusion2gan" and parts:
            target = find_module(parts)
            if target is not None:
                found.add(target)
            elif len(parts) > 1:
                raise AssertionError(f"{module} imports {name}, which does not exist")
    return found - {module}


def find_module(parts: list[str]) -> str | None:
    """The longest prefix of a dotted name that is a module: a name in a module is not one."""
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        for candidate in (prefix, f"{prefix}.__init__"):
            if candidate in MODULES:
                return candidate
    return None


def imported_libraries(tree: ast.AST, module: str) -> set[str]:
    return {name.split(".")[0] for name in imported_names(tree, module)}


def wrong_imports(module: str, targets: set[str]) -> set[str]:
    """The imports of `module` that break the order of rooms."""
    source = room(module)
    if source in TOP:
        return set()

    wrong = {target for target in targets if LEVEL[room(target)] > LEVEL[source]}
    if source not in POCKET_USERS:
        wrong |= {target for target in targets if room(target) == "pocket"}
    return wrong


def find_cycles(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The pairs of rooms that import each other, directly or through others."""
    # Transitive closure (Warshall)
    reachable = {name: set(targets) for name, targets in edges.items()}
    for middle in reachable:
        for targets in reachable.values():
            if middle in targets:
                targets |= reachable[middle]

    cycles = []
    for a in sorted(reachable):
        for b in sorted(reachable):
            if a < b and b in reachable[a] and a in reachable[b]:
                cycles.append((a, b))
    return cycles


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {module_name(file): ast.parse(file.read_text("utf-8"), str(file)) for file in FILES}


def test_every_room_has_a_level(trees: dict[str, ast.Module]) -> None:
    unknown = {room(module) for module in trees} - set(LEVEL) - {"__init__"}
    assert not unknown, f"add these rooms to LEVEL, in this file: {unknown}"


def test_rooms_import_downwards_only(trees: dict[str, ast.Module]) -> None:
    wrong = {}
    for module, tree in trees.items():
        if found := wrong_imports(module, imported_modules(tree, module)):
            wrong[module] = found
    assert not wrong, f"a room imports one above it: {wrong}"


def test_jobs_do_not_import_each_other(trees: dict[str, ast.Module]) -> None:
    wrong = {}
    for job in JOBS & set(trees):
        if found := imported_modules(trees[job], job) & (JOBS - {job}):
            wrong[job] = found
    assert not wrong, f"a job imports another job: {wrong}"


def test_no_two_rooms_import_each_other(trees: dict[str, ast.Module]) -> None:
    edges: dict[str, set[str]] = {room(module): set() for module in trees}
    for module, tree in trees.items():
        if room(module) != "__init__":
            targets = {room(target) for target in imported_modules(tree, module)}
            edges[room(module)] |= targets - {room(module), "__init__"}
    assert not find_cycles(edges)


def test_cycles_of_rooms_are_found() -> None:
    cycle = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert find_cycles(cycle) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_wrong_imports_are_found() -> None:
    assert wrong_imports("teacher.ode", {"pairs.store", "runtime.files"}) == {"pairs.store"}
    assert wrong_imports("pairs.make", {"pocket.scenes", "teacher.ode"}) == {"pocket.scenes"}
    assert wrong_imports("pocket.train", {"distill.train", "noise"}) == {"distill.train"}


def test_relative_and_late_imports_are_found() -> None:
    code = """
from ..runtime import files
from . import scenes
def f():
    import diffusion2gan.errors
"""
    found = imported_modules(ast.parse(code), "pocket.train")
    assert found == {"runtime.files", "pocket.scenes", "errors"}


def test_diffusers_is_imported_only_by_its_users(trees: dict[str, ast.Module]) -> None:
    users = {
        module for module, tree in trees.items() if "diffusers" in imported_libraries(tree, module)
    }
    wrong = {module for module in users if not f"{module}.".startswith(DIFFUSERS_USERS)}
    assert not wrong, f"diffusers is imported outside {DIFFUSERS_USERS}: {wrong}"


# The command line


def top_level_imports(tree: ast.Module, module: str) -> set[str]:
    """The libraries that are loaded when `module` is imported."""
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imported_libraries(ast.Module(statements, []), module)


def test_cli_modules_load_no_library_but_typer(trees: dict[str, ast.Module]) -> None:
    allowed = CLI_IMPORTS | set(sys.stdlib_module_names)
    wrong = {}
    for module, tree in trees.items():
        if room(module) != "cli":
            continue
        if found := top_level_imports(tree, module) - allowed:
            wrong[module] = found
    assert not wrong, f"import these inside the command that uses them: {wrong}"


def test_cli_modules_load_only_each_other_and_errors(trees: dict[str, ast.Module]) -> None:
    wrong = {}
    for module, tree in trees.items():
        if room(module) != "cli":
            continue
        statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        rooms = {room(m) for m in imported_modules(ast.Module(statements, []), module)}
        if found := rooms - {"cli", "errors", "__init__"}:
            wrong[module] = found
    assert not wrong, f"import these inside the command that uses them: {wrong}"


def test_top_level_imports_are_distinguished_from_late_ones() -> None:
    tree = ast.parse("import typer\nfrom torch import nn\ndef f():\n    import diffusers")
    assert top_level_imports(tree, "cli.pairs") == {"typer", "torch"}


def test_help_loads_no_heavy_library() -> None:
    code = f"""
import sys
from diffusion2gan.cli import main
sys.argv = ["diffusion2gan", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, f"--help loads {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout
    assert not done.stderr, "output beside the help"


# Safety

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def unsafe_loads(tree: ast.AST) -> Iterator[str]:
    """What could run code from a file: pickles, `torch.load` without `weights_only=True`, remote
    code.
    """
    for name in imported_names(tree, "x"):
        if name.split(".")[0] in PICKLES:
            yield f"import {name}"

    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        for name in ("trust_remote_code", "allow_pickle"):
            if keywords.get(name, "False") != "False":
                yield f"{name}={keywords[name]}"


def test_nothing_unsafe_is_loaded(trees: dict[str, ast.Module]) -> None:
    wrong = {}
    for module, tree in trees.items():
        if found := list(unsafe_loads(tree)):
            wrong[module] = found
    assert not wrong, f"only safetensors may be loaded: {wrong}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "load(path, trust_remote_code=True)",
    ],
)
def test_unsafe_loads_are_found(code: str) -> None:
    assert list(unsafe_loads(ast.parse(code)))


# Text

# One letter of each in brackets, so that this file does not contain the names themselves.
REGISTRIES = re.compile(
    r"\bpy[p]i\b|python[h]osted|download\.py[t]orch|ana[c]onda\.org|npm[j]s", re.I
)
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(work|root|home|Users)/\w")
UNFORMATTED = re.compile(r"# fmt: (skip|off)")
TEXT_SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yml",
    ".yaml",
    ".json",
    ".j2",
    ".html",
    ".js",
    ".css",
    ".svg",
    ".cfg",
    ".sh",
    ".sbatch",
}
FOLDERS = ("src", "tests", "docs", "benchmarks", "examples", ".ci")


def text_files() -> Iterator[Path]:
    """Every text file of the project."""
    yield ROOT / "Makefile"
    yield ROOT / ".ci" / "run"
    for file in ROOT.iterdir():
        if file.suffix in TEXT_SUFFIXES:
            yield file
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in TEXT_SUFFIXES:
                yield file


def find_in_text(pattern: re.Pattern[str], files: Iterator[Path]) -> list[str]:
    """`FILE:LINE: MATCH` for every match."""
    found = []
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {match.group()}")
    return found


@pytest.mark.parametrize("pattern", [REGISTRIES, MACHINE_PATH], ids=["registries", "paths"])
def test_no_file_names_a_package_registry_or_a_path_of_one_machine(
    pattern: re.Pattern[str],
) -> None:
    found = find_in_text(pattern, text_files())
    assert not found, "\n".join(found)


def test_registries_and_machine_paths_are_found() -> None:
    assert REGISTRIES.search("see py" + "pi.org")
    assert MACHINE_PATH.search("see " + "/root" + "/x")
    assert not MACHINE_PATH.search("https://example.org" + "/work" + "/x")


def test_no_code_is_exempt_from_formatting() -> None:
    python = (file for file in text_files() if file.suffix == ".py" and file != Path(__file__))
    found = find_in_text(UNFORMATTED, python)
    assert not found, "\n".join(found)
    assert UNFORMATTED.search("x = 1  # fmt: " + "skip")
