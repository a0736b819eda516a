"""The house's rules: imports go down, heavy libraries wait at their doors, nothing unsafe, nothing of one machine."""

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

# A room imports rooms of its own level or below, and no two rooms import each other.
LEVEL = {
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
    "export": 6,
    "compare": 7,
    "serve": 8,
    "demo": 9,
    "cli": 10,
    "__main__": 11,
}
TOP = {
    "demo",
    "cli",
    "__main__",
    "__init__",
}  # these may import everything; `__init__` is the public surface
JOBS = {
    "pairs.make",
    "distill.train",
    "export",
    "evaluate.run",
    "compare.compare",
    "serve.serve",
    "perceptual.fit",
    "perceptual.calibrate",
}
POCKET_USERS = {"pocket", "evaluate", "compare", "serve"} | TOP
DIFFUSERS_DOORS = ("teacher.", "pocket.", "pipelines.", "export")
HEAVY = ("torch", "diffusers", "transformers")


def module_name(file: Path) -> str:
    """`teacher/ode.py` → "teacher.ode"; a package's `__init__.py` → "teacher.__init__"."""
    return ".".join(file.relative_to(SRC).with_suffix("").parts)


MODULES = {module_name(file) for file in FILES}


def room(module: str) -> str:
    return module.split(".")[0]


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Every dotted name that `module` imports, anywhere in it; "diffusion2gan" in front of our own."""
    package = ["diffusion2gan", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def own_imports(tree: ast.AST, module: str) -> set[str]:
    """The modules of this package that `module` imports, named as `module_name` does."""
    found = set()
    for name in imports(tree, module):
        parts = name.split(".")
        if parts[0] != "diffusion2gan":
            continue
        longest = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
        target = next((c for m in longest for c in (m, f"{m}.__init__") if c in MODULES), None)
        if target is not None:
            found.add(target)
        elif len(parts) > 2:
            raise AssertionError(f"{module} imports {name}, which is not there")
    return found - {module}


def upward(module: str, targets: set[str]) -> set[str]:
    """The imports of `module` that break the order of rooms."""
    here = room(module)
    if here in TOP:
        return set()
    to_pocket = {
        target for target in targets if room(target) == "pocket" and here not in POCKET_USERS
    }
    return to_pocket | {target for target in targets if LEVEL[room(target)] > LEVEL[here]}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What could run code out of a file: pickles, `torch.load` without `weights_only=True`, remote code."""
    for name in imports(tree, "x"):
        if name.split(".")[0] in {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "joblib",
            "marshal",
            "shelve",
        }:
            yield f"import {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        for name in ("trust_remote_code", "allow_pickle"):
            if keywords.get(name, "False") != "False":
                yield f"{name}={keywords[name]}"


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {module_name(file): ast.parse(file.read_text("utf-8"), str(file)) for file in FILES}


def test_every_room_has_its_place(trees: dict[str, ast.Module]) -> None:
    strangers = {room(m) for m in trees} - set(LEVEL) - {"__init__"}
    assert not strangers, f"no place in the order of rooms (LEVEL, in this file): {strangers}"


def test_imports_go_one_way(trees: dict[str, ast.Module]) -> None:
    wrong = {m: found for m, tree in trees.items() if (found := upward(m, own_imports(tree, m)))}
    assert not wrong, f"a room imports one above it: {wrong}"


def test_jobs_meet_only_on_disk(trees: dict[str, ast.Module]) -> None:
    wrong = {
        m: found for m in JOBS & set(trees) if (found := own_imports(trees[m], m) & (JOBS - {m}))
    }
    assert not wrong, f"a job imports another job: {wrong}"


def cycles(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The pairs of rooms that reach each other."""
    reach = {name: set(targets) for name, targets in edges.items()}
    for middle in reach:
        for name in reach:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return [
        (a, b)
        for a in sorted(reach)
        for b in sorted(reach)
        if a < b and b in reach[a] and a in reach[b]
    ]


def test_no_two_rooms_import_each_other(trees: dict[str, ast.Module]) -> None:
    edges: dict[str, set[str]] = {room(module): set() for module in trees}
    for module, tree in trees.items():
        if room(module) != "__init__":
            edges[room(module)] |= {room(target) for target in own_imports(tree, module)} - {
                room(module),
                "__init__",
            }
    assert not cycles(edges)


def test_a_cycle_of_rooms_is_noticed() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def imported_roots(tree: ast.AST, module: str) -> Iterator[str]:
    return (name.split(".")[0] for name in imports(tree, module))


def test_diffusers_only_at_its_doors(trees: dict[str, ast.Module]) -> None:
    users = {m for m, tree in trees.items() if "diffusers" in imported_roots(tree, m)}
    wrong = {m for m in users if not (m + ".").startswith(DIFFUSERS_DOORS)}
    assert not wrong, f"diffusers is imported outside {DIFFUSERS_DOORS}: {wrong}"


def test_nothing_unsafe_is_loaded(trees: dict[str, ast.Module]) -> None:
    wrong = {m: found for m, tree in trees.items() if (found := list(unsafe(tree)))}
    assert not wrong, f"safetensors only: {wrong}"


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
def test_the_unsafe_is_noticed(code: str) -> None:
    assert list(unsafe(ast.parse(code)))


def test_the_wrong_way_is_noticed() -> None:
    assert upward("teacher.ode", {"pairs.store", "runtime.files"}) == {"pairs.store"}
    assert upward("pairs.make", {"pocket.scenes", "teacher.ode"}) == {"pocket.scenes"}
    assert upward("pocket.train", {"distill.train", "perceptual.vgg"}) == {"distill.train"}
    relative = ast.parse(
        "from ..runtime import files\nfrom . import scenes\ndef f():\n    import diffusion2gan.errors"
    )
    assert own_imports(relative, "pocket.train") == {"runtime.files", "pocket.scenes", "errors"}


def test_help_loads_nothing_heavy() -> None:
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout
    assert not done.stderr, "a noise beside the help"


# One letter of each in brackets, so that this file does not name them itself.
REGISTRIES = re.compile(
    r"\bpy[p]i\b|python[h]osted|download\.py[t]orch|ana[c]onda\.org|npm[j]s", re.I
)
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(work|root|home|Users)/\w")
TEXT = {
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
}
FOLDERS = ("src", "tests", "docs", "recipes", "benchmarks", "examples", ".ci")


def texts() -> Iterator[Path]:
    """Every text file that belongs to the project."""
    yield from (ROOT / name for name in ("Makefile", ".ci/run"))
    yield from (file for file in ROOT.iterdir() if file.suffix in TEXT)
    yield from (
        file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in TEXT
    )


def test_nothing_of_one_machine_nor_of_a_registry() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{number}: {match.group()}"
        for file in texts()
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if (match := REGISTRIES.search(line) or MACHINE_PATH.search(line))
    ]
    assert not wrong, "\n".join(wrong)


def test_a_machine_path_or_registry_is_noticed() -> None:
    assert REGISTRIES.search("see py" + "pi.org")
    assert MACHINE_PATH.search("see " + "/root" + "/x")
    assert not MACHINE_PATH.search("https://example.org" + "/work" + "/x")
