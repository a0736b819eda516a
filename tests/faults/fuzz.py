"""Seeded fuzzers: recipes, command lines, damaged files, and files from an attacker.

    python tests/faults/fuzz.py        # or: make faults

All of it runs in this process. What is tried must end in success, or in one paragraph of a
UserError or Failure; never in another exception, in files left by a refused command, or in a
program run by a file that was read. Bytes that are damaged must be noticed, or the value read must
be the same; files without a checksum, such as a list of prompts, are counted as *used as they are*.

Writes docs/results/fuzz.json: for each campaign what was tried, how many, how it ended.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import tomllib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, tests/ is not importable
import tiny_pocket
from cli.runner import run

from diffusion2gan import assets
from diffusion2gan.cli import app
from diffusion2gan.compare.compare import read_metrics
from diffusion2gan.distill.run import load_student, read_description, truncate_log
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import Diffusion2GANError
from diffusion2gan.evaluate.protocols import read_captions
from diffusion2gan.pairs import check, exchange, store
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.perceptual.importers import import_network, read_tensors
from diffusion2gan.perceptual.triplets import read_judgement
from diffusion2gan.perceptual.weights import load_network
from diffusion2gan.pipelines.image_folder import open_images, read_image
from diffusion2gan.prompts import read_prompts
from diffusion2gan.recipe import SHIPPED, Recipe, load_recipe, shipped_recipes
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.cache import load_or_compute
from diffusion2gan.runtime.files import write_json
from diffusion2gan.serve.history import load_history, save_image
from diffusion2gan.serve.votes import append_vote, read_votes, summarize
from diffusion2gan.teacher.loading import load_teacher

OUT = Path(__file__).parents[2] / "docs" / "results" / "fuzz.json"
# Of the long form; the slow tests run a tenth
COUNTS = {"recipes": 10_000, "command_lines": 1_000, "damage": 2_300}
MAX_MESSAGE = 2_300
COMMAND_S = 3  # a command line that is accepted runs this long
# No message may advise deleting what may be good
DELETE = re.compile(r"\b(delete|remove) (it|this|them|the file|the folder)\b", re.IGNORECASE)


class OutOfTime(BaseException):
    """An accepted command is ended."""


@dataclass
class Outcomes:
    """How the attempts of a campaign ended, and the problems found (at most 50 are listed)."""

    counts: Counter[str]
    problems: list[str]

    @classmethod
    def empty(cls) -> Outcomes:
        return cls(Counter(), [])

    def add(self, ending: str) -> None:
        self.counts[ending] += 1

    def problem(self, text: str) -> None:
        self.counts["problem"] += 1
        if len(self.problems) < 50:
            self.problems.append(text[:400])

    def to_dict(self) -> dict[str, Any]:
        tried = sum(self.counts.values())
        return {"tried": tried, **dict(sorted(self.counts.items())), "problems": self.problems}


def find_problem(message: str) -> str | None:
    """What is wrong with an error message; None if it is one plain paragraph."""
    if "Traceback" in message or "\n" in message.strip():
        return "more than one line"
    if not 10 < len(message) < MAX_MESSAGE:
        return f"{len(message)} characters"
    if DELETE.search(message):
        return "advises deleting"
    return None


def attempt(name: str, call: Callable[[], Any], outcomes: Outcomes) -> tuple[bool, Any]:
    """Calls; counts a refusal or a problem. Returns (whether it succeeded, its value)."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return True, call()
    except Diffusion2GANError as error:
        wrong = find_problem(str(error))
        if wrong is None:
            outcomes.add("refused")
        else:
            outcomes.problem(f"{name}: {wrong}: {error}")
    except Exception as error:
        outcomes.problem(f"{name}: {type(error).__name__}: {error}")
    return False, None


# ---------------------------------------------------------------------------------------- Recipes

VALUES = (
    *("0", "-1", "1", "3", "1e-4", "0.5", "true", "false", "nan", "inf", "-inf", "1e400", "9" * 30),
    *(
        '""',
        '"x"',
        '"mse"',
        '"teacher"',
        '"0"',
        '"1e-3"',
        '"\\u0000"',
        '"😀"',
        '"' + "x" * 3000 + '"',
    ),
    *(
        "[]",
        "[1, 2]",
        "{}",
        "{a = 1}",
        "[" * 40 + "]" * 40,
        "1979-05-27",
        "07:32:00",
        "0x1F",
        "1_0",
    ),
    *("9" * 5000, "[" * 5000 + "]" * 5000, "'''\na\n'''", "", "x", "=", '"unfinished'),
)


def random_recipe(rng: random.Random) -> bytes:
    """A shipped recipe with some settings changed or added, and sometimes some of its bytes."""
    lines = (SHIPPED / f"{rng.choice(shipped_recipes())}.toml").read_text("utf-8").splitlines()
    names = [*Recipe.model_fields, "pairs_seen", "unknown", "a.b", '"quoted name"', "", "ключ"]
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(names)
        line = f"{name} = {rng.choice(VALUES)}"
        same = [i for i, text in enumerate(lines) if text.startswith(f"{name} ")]
        if same and rng.random() < 0.9:
            lines[same[0]] = line
        else:
            lines.append(line)
    content = bytearray("\n".join(lines).encode())
    if rng.random() < 0.15:
        for _ in range(rng.randint(1, 5)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.05:
        content = content[: rng.randrange(len(content))]
    return bytes(content)


def fuzz_recipes(count: int, seed: int, base: Path) -> Outcomes:
    """Recipe files and `--set` options. An accepted recipe has the values that are written."""
    rng = random.Random(seed)
    outcomes = Outcomes.empty()
    path = base / "recipe.toml"
    for number in range(count):
        content = random_recipe(rng)
        path.write_bytes(content)
        settings = []
        if rng.random() < 0.3:
            name = rng.choice([*Recipe.model_fields, "unknown", ""])
            settings = [rng.choice(["", "=", f"{name}", f"{name}={rng.choice(VALUES)}"])]

        def load(settings: list[str] = settings) -> Recipe:
            return load_recipe(str(path), settings)

        succeeded, recipe = attempt(f"recipe {number}", load, outcomes)
        if not succeeded:
            continue
        written = tomllib.loads(content.decode("utf-8"))
        for setting in settings:
            key, _, text = setting.partition("=")
            written[key.strip()] = text.strip()
        different = [
            key for key, value in written.items() if not is_same(getattr(recipe, key), value)
        ]
        if different:
            outcomes.problem(f"recipe {number}: {different[0]} is not what is written")
        elif Recipe.model_validate(recipe.model_dump()) != recipe:
            outcomes.problem(f"recipe {number}: not the same when written and read")
        else:
            outcomes.add("accepted")
    return outcomes


def is_same(value: Any, written: Any) -> bool:
    """Whether a setting has the value that is written; numbers may be written as text."""
    if value == written:
        return isinstance(value, bool) or not isinstance(written, bool)
    if isinstance(written, int) and isinstance(value, float):
        return float(written) == value
    if not isinstance(written, str) or isinstance(value, str):
        return False
    if isinstance(value, bool):
        return written.lower() in (
            ("true", "1", "yes", "on", "y", "t") if value else ("false", "0", "no", "off", "n", "f")
        )
    return float(written.replace("_", "")) == value


# ---------------------------------------------------------------------------------- Command lines

# No absolute path, `..` or `~`: an accepted command writes there, perhaps as root
WORDS = (
    *("", " ", "-", "--", "0", "-1", "1", "2", "1e9", "nan", "inf", "x", "=", "a=b", "x/y", "."),
    *("s3://", "http://", "gs:/x", "pocket", "😀", "junk.bin/x", "folder/a.txt/b"),
    *("pocket-student", "pocket-teacher@2", "nowhere", "folder", "empty", "junk.bin", "junk.json"),
    *("teacher", "pairs", "9" * 400, "x" * 5000, "a\nb", "%s", "$(id)", "--help", "cpu", "cuda:9"),
)
# Commands that serve, or run for hours with their defaults, and what they get to be refused
LONG = {
    "demo": ["--out", "junk.bin/x"],
    "serve": ["nowhere"],
    "pocket train": ["--out", "junk.bin/x"],
}


def list_commands() -> dict[str, Any]:
    """`pairs info` → click's command."""
    import typer.main

    found: dict[str, Any] = {}

    def walk(command: Any, words: list[str]) -> None:
        found[" ".join(words)] = command
        for name, child in getattr(command, "commands", {}).items():
            walk(child, [*words, name])

    walk(typer.main.get_command(app), [])
    return found


def random_command_line(rng: random.Random, commands: dict[str, Any]) -> list[str]:
    """A command with some of its options and arguments, and words of all kinds as their values."""
    name = rng.choice(sorted(commands))
    words = name.split()
    for parameter in commands[name].params:
        is_required = parameter.required or parameter.param_type_name == "argument"
        if not is_required and rng.random() > 0.15:
            continue
        if parameter.param_type_name == "option":
            words.append(rng.choice([*parameter.opts]))
        if not getattr(parameter, "is_flag", False):
            words.append(rng.choice(WORDS))
    if rng.random() < 0.1:
        words.append(rng.choice(WORDS))
    if name in LONG:
        words += LONG[name]
    return words


def list_tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after some seconds."""

    def end(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz_command_lines(count: int, seed: int, base: Path) -> Outcomes:
    """A refused command leaves no file; an accepted one is ended after some seconds."""
    rng = random.Random(seed)
    outcomes = Outcomes.empty()
    commands = list_commands()
    folder = base / "commands"
    build_command_folder(folder)
    before = list_tree(folder)
    with contextlib.chdir(folder):
        for _ in range(count):
            words = random_command_line(rng, commands)
            line = shlex.join(words)[:300]
            try:
                with ended_after(COMMAND_S):
                    result = run(*words)
            except OutOfTime:
                outcomes.add("accepted, ended")
            except BaseException as error:
                outcomes.problem(f"{line}: {type(error).__name__}: {error}")
            else:
                judge_command(line, result, list_tree(folder) - before, outcomes)
            for name in sorted(list_tree(folder) - before, reverse=True):
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            missing = before - list_tree(folder)
            if missing:
                outcomes.problem(f"{line}: deleted {sorted(missing)[:3]}")
                build_command_folder(folder)
    return outcomes


def judge_command(line: str, result: Any, new: set[str], outcomes: Outcomes) -> None:
    if "Traceback" in result.err + result.out:
        outcomes.problem(f"{line}: {result.err}")
    elif result.code == 0:
        outcomes.add("accepted")
    elif result.code not in (1, 2):
        outcomes.problem(f"{line}: exit code {result.code}")
    elif new:
        outcomes.problem(f"{line}: left {sorted(new)[:3]}: {result.err[-200:]}")
    elif DELETE.search(result.err):
        outcomes.problem(f"{line}: advises deleting: {result.err}")
    else:
        outcomes.add("refused")


def build_command_folder(folder: Path) -> None:
    """What the words of command lines name: folders and files, of no use or small."""
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "empty").mkdir(parents=True)
    (folder / "folder").mkdir()
    (folder / "folder" / "a.txt").write_text("a")
    (folder / "junk.bin").write_bytes(bytes(range(256)))
    (folder / "junk.json").write_text('{"a": [1, 2')
    tiny_pocket.save(folder / "teacher")
    shutil.copytree(
        assets.folder("pairs"), folder / "pairs", ignore=shutil.ignore_patterns("*[1-9].parquet")
    )


# ---------------------------------------------------------------------------------- Kinds of files


class Noticed(Diffusion2GANError):
    """The damage is noticed, and not reported by an error: by `pairs verify`'s list, or skipped."""

    def __init__(self) -> None:
        super().__init__("the damage is noticed")


@dataclass(frozen=True)
class Kind:
    """A kind of file: `files` below the folder of `base`, and `read(folder)`, what they mean.

    `checked`: damage must be noticed, because the format has checksums; otherwise a changed value
    may be used as it is.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    checked: bool = False


def build_files(base: Path) -> list[Kind]:
    """Writes a small good file of every kind that the project reads."""
    torch.manual_seed(0)
    base.mkdir(parents=True)

    # Teacher, pairs, run
    teacher = load_teacher(str(tiny_pocket.save(base / "teacher")))
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 1, 1.0, teacher.latent_shape, 2)
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, base / "pairs")
    recipe = Recipe(
        teacher=str(base / "teacher"), loss="mse", total_pairs=4, batch_size=2, adversarial_weight=0
    )
    distill(recipe, base / "pairs", base / "run")
    exchange.export_webdataset(base / "pairs", base / "tars")

    # Networks, caches, images
    shutil.copytree(assets.folder("latent_vgg"), base / "network")
    weights_file = base / "network" / "model.safetensors"
    checkpoint.save(weights_file, *checkpoint.load(weights_file))  # the shipped one has no digests
    load_or_compute(base / "cache.safetensors", {"a": 1}, lambda: {"x": torch.ones(8, 8)})
    torch.save({"x.weight": torch.ones(4)}, base / "weights.pth")
    (base / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp"):
        Image.fromarray(pixels).save(base / "images" / f"image.{suffix}")
    (base / "history").mkdir()
    save_image(base / "history", Image.fromarray(pixels), {"prompt": "a", "seed": 1})
    (picture,) = (base / "history").iterdir()
    picture.rename(base / "history" / "0.png")
    np.save(base / "judge.npy", np.array([0.25]))

    # Text and JSON
    (base / "prompts.txt").write_text("a red star\na blue ring\n")
    rows = [{"image_id": i, "id": i, "caption": f"caption {i}"} for i in range(3)]
    (base / "captions.json").write_text(json.dumps({"annotations": rows}))
    (base / "metrics.json").write_text(json.dumps({"system": "a", "frechet_distance": 1.5}))
    vote = {"voter": "v", "prompt_index": 0, "prompt": "a", "left": "a", "right": "b"}
    vote |= {"study": {"a": "a", "b": "b", "digest": "d"}, "realism": "a", "alignment": "b"}
    append_vote(base / "votes.jsonl", vote)
    (base / "recipe.toml").write_text('loss = "mse"\nbatch_size = 8\n')

    def file_names(folder: str, pattern: str = "*") -> tuple[str, ...]:
        found = sorted(path for path in (base / folder).rglob(pattern) if path.is_file())
        return tuple(str(path.relative_to(base)) for path in found)

    def read_log(folder: Path) -> bytes:
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            shutil.copy(folder / "run" / "log.jsonl", copy)
            truncate_log(copy, 4)
            return (copy / "log.jsonl").read_bytes()

    def import_tars(folder: Path) -> Any:
        with tempfile.TemporaryDirectory() as name:
            exchange.import_webdataset(folder / "tars", Path(name) / "set")
            return digest_pairs(Path(name) / "set")

    def import_weights(folder: Path) -> Any:
        with tempfile.TemporaryDirectory() as name:
            return import_network([folder / "weights.pth"], "lpips", Path(name) / "out")

    all_images = file_names("images")

    def read_images(folder: Path) -> Any:
        return [read_image(folder / name).tobytes() for name in all_images]

    def read_image_folder(folder: Path) -> Any:
        return next(open_images("f", folder / "history").read([0])).tobytes()

    def read_history(folder: Path) -> Any:
        history = load_history(folder / "history", 4)
        if not history:
            raise Noticed
        return [(image.tobytes(), caption) for image, caption in history]

    def at(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda folder: read(folder / name)

    teacher_read = at("teacher", digest_teacher)
    read_network = at("network", digest_network)
    network = file_names("network", "*.safetensors")
    checkpoint_file = ("run/checkpoint.safetensors",)
    cache, weights = "cache.safetensors", "weights.pth"
    return [
        Kind("pairs.json", ("pairs/pairs.json",), at("pairs", store.open_set)),
        Kind("shard of pairs", file_names("pairs", "*.parquet"), at("pairs", digest_pairs), True),
        Kind("pairs as tars", file_names("tars"), import_tars),
        Kind("teacher: settings", file_names("teacher", "*.json"), teacher_read),
        Kind("teacher: tokenizer", file_names("teacher/tokenizer"), teacher_read),
        Kind("teacher: weights", file_names("teacher", "*.safetensors"), teacher_read),
        Kind("run: recipe.json", ("run/recipe.json",), at("run", read_description)),
        Kind("run: checkpoint", checkpoint_file, at("run", digest_run), True),
        Kind("run: log.jsonl", ("run/log.jsonl",), read_log),
        Kind("perceptual network: settings", ("network/config.json",), read_network),
        Kind("perceptual network: weights", network, read_network, True),
        Kind("cached images or features", (cache,), at(cache, digest_checkpoint), True),
        Kind("published weights (.pth)", (weights,), at(weights, digest_published)),
        Kind("import of published weights", (weights,), import_weights),
        Kind("image", all_images, read_images),
        Kind("image of a folder", ("history/0.png",), read_image_folder),
        Kind("saved image of serve", ("history/0.png",), read_history),
        Kind("judgement (.npy)", ("judge.npy",), at("judge.npy", read_judgement)),
        Kind("prompts", ("prompts.txt",), at("prompts.txt", read_prompts)),
        Kind("captions", ("captions.json",), at("captions.json", lambda f: read_captions(f, 3))),
        Kind("metrics.json", ("metrics.json",), at("metrics.json", read_one_metrics)),
        Kind("votes", ("votes.jsonl",), at("votes.jsonl", lambda f: (read_votes(f), summarize(f)))),
        Kind("recipe", ("recipe.toml",), at("recipe.toml", lambda f: load_recipe(str(f)))),
    ]


def read_one_metrics(path: Path) -> Any:
    return read_metrics({"a": str(path)}, ["a"])


def digest_published(path: Path) -> Any:
    return digest_tensors(read_tensors(path))


def digest_tensors(tensors: dict[str, torch.Tensor]) -> Any:
    digest = {}
    for key, value in sorted(tensors.items()):
        flat = value.detach().contiguous().flatten()
        digest[key] = (tuple(value.shape), zlib.crc32(flat.view(torch.uint8).numpy().tobytes()))
    return digest


def digest_pairs(folder: Path) -> Any:
    problems = check.verify(folder)
    for problem in problems:
        if find_problem(problem):
            raise AssertionError(problem)
    if problems:
        raise Noticed
    pairs = [
        store.read_shard(folder, number)
        for number in store.present_shards(folder, store.open_set(folder))
    ]
    return [(p.index, p.seed, p.prompts, p.latents.numpy().tobytes()) for p in pairs]


def digest_teacher(folder: Path) -> Any:
    pipeline = load_teacher(str(folder)).pipeline
    tensors = {}
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            for key, value in module.state_dict().items():
                tensors[f"{name}.{key}"] = value
    tokens = pipeline.tokenizer(["a large red star on sand"]).input_ids
    return digest_tensors(tensors), dict(pipeline.scheduler.config), tokens


def digest_run(folder: Path) -> Any:
    _, tensors, description = load_student(folder)
    return digest_tensors(tensors), description


def digest_network(folder: Path) -> Any:
    network, heads, config = load_network(str(folder), "latent_vgg")
    return digest_tensors(network.state_dict()), [head.tolist() for head in heads], config


def digest_checkpoint(path: Path) -> Any:
    tensors, meta = checkpoint.load(path)
    return digest_tensors(tensors), meta


def fuzz_damage(count: int, seed: int, base: Path) -> dict[str, Outcomes]:
    """Flipped bytes and bits, zeroed and cut pieces, in files of every kind."""
    rng = random.Random(seed)
    kinds = build_files(base / "damage")
    folder = base / "damage"
    all_outcomes = {}
    for kind in kinds:
        outcomes = Outcomes.empty()
        _, expected = attempt(kind.name, lambda kind=kind: kind.read(folder), Outcomes.empty())
        for number in range(count // len(kinds)):
            path = folder / rng.choice(kind.files)
            original = path.read_bytes()
            path.write_bytes(damage(original, rng))
            name = f"{kind.name} {number} ({path.name})"
            succeeded, value = attempt(name, lambda kind=kind: kind.read(folder), outcomes)
            path.write_bytes(original)
            if not succeeded:
                continue
            if repr(value) == repr(expected):
                outcomes.add("harmless")
            elif kind.checked:
                outcomes.problem(f"{name}: another value, in silence")
            else:
                outcomes.add("used as it is")
        all_outcomes[kind.name] = outcomes
    return all_outcomes


def damage(content: bytes, rng: random.Random) -> bytes:
    """One flipped byte in most cases; or a flipped bit, zeros, a cut end, surplus bytes."""
    position = rng.randrange(len(content))
    changed = bytearray(content)
    kind = rng.choice(["byte", "byte", "byte", "bit", "zeros", "cut", "surplus", "header"])
    if kind == "header":
        position = rng.randrange(min(len(content), 64))
    if kind in ("byte", "header"):
        changed[position] ^= rng.randrange(1, 256)
    elif kind == "bit":
        changed[position] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        end = min(len(content), position + 512)
        changed[position:end] = bytes(end - position)
    elif kind == "cut":
        del changed[position:]
    else:
        changed += rng.randbytes(rng.randrange(1, 64))
    return bytes(changed)


# ---------------------------------------------------------------------------------- Untrusted files


class RunsCode:
    """Unpickling it writes a file."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def build_payloads(mark: Path) -> dict[str, bytes]:
    """Contents that an attacker, or an accident, may put in the place of any file."""
    code = pickle.dumps(RunsCode(str(mark)))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", bytes(50_000_000))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name in ("../../escaped", "/tmp/escaped", "000000000.json"):
            member = tarfile.TarInfo(name)
            member.size = 4
            file.addfile(member, io.BytesIO(b"null"))
        link = tarfile.TarInfo("000000000.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    numbers = io.BytesIO()
    np.save(numbers, np.array([RunsCode(str(mark))], dtype=object), allow_pickle=True)
    npy_header = (
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}"
    )
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
    png += struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    return {
        "empty": b"",
        "Git LFS pointer": pointer,
        "pickle that runs code": code,
        "archive with a pickle that runs code, and a bomb": archive.getvalue(),
        "array with a pickle that runs code": numbers.getvalue(),
        "array of 2^60 numbers": npy_header.replace(b"%d", b"1152921504606846976").ljust(128)
        + b"\n",
        "tar with paths outside": tar.getvalue(),
        "PNG of 2^62 pixels": png,
        "safetensors with a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
        "safetensors with a tensor of 2^42 bytes": struct.pack("<Q", len(header)) + header,
        "safetensors with a nested header": struct.pack("<Q", 60_000) + b"[" * 60_000,
        "JSON nested 100 000 deep": b"[" * 100_000,
        "JSON objects nested 50 000 deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "number of 100 000 digits": b"9" * 100_000,
        "JSON of another type": b"[null, 1e999, NaN]",
        "null": b"null",
        "HTML": b"<!DOCTYPE html><title>404</title>",
        "zeros": bytes(4096),
        "UTF-16": "{}".encode("utf-16"),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    }


def try_untrusted(base: Path) -> dict[str, Outcomes]:
    """Every payload in the place of a file of every kind."""
    kinds = build_files(base / "untrusted")
    folder = base / "untrusted"
    mark = base / "code_was_run"
    all_outcomes = {}
    for name, payload in build_payloads(mark).items():
        outcomes = Outcomes.empty()
        for kind in kinds:
            for file in {kind.files[0], kind.files[-1]}:
                path = folder / file
                original = path.read_bytes()
                path.write_bytes(payload)
                label = f"{name} as {file} ({kind.name})"
                succeeded, _ = attempt(label, lambda kind=kind: kind.read(folder), outcomes)
                path.write_bytes(original)
                if mark.exists():
                    outcomes.problem(f"{label}: code was run")
                    mark.rmdir()
                if succeeded:
                    outcomes.add("harmless")
        all_outcomes[name] = outcomes
    return all_outcomes


# -------------------------------------------------------------------------------------------- Main


CAMPAIGNS = ("recipes", "damage", "untrusted", "command_lines")


def run_campaign(name: str, share: float, seed: int) -> dict[str, Any]:
    """A campaign with `share` of its number of attempts."""
    count = round(share * COUNTS.get(name, 0))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        if name == "recipes":
            return fuzz_recipes(count, seed, base).to_dict()
        if name == "damage":
            return to_dicts(fuzz_damage(count, seed, base))
        if name == "untrusted":
            return to_dicts(try_untrusted(base))
        return fuzz_command_lines(count, seed, base).to_dict()


def to_dicts(outcomes: dict[str, Outcomes]) -> dict[str, Any]:
    return {name: found.to_dict() for name, found in outcomes.items()}


def list_problems(result: dict[str, Any]) -> list[str]:
    """All problems in a result, at any depth."""
    problems = []
    for key, value in result.items():
        if key == "problems":
            problems += value
        elif isinstance(value, dict):
            problems += list_problems(value)
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers of attempts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", action="append", choices=CAMPAIGNS, help="repeatable")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    found["command"] = shlex.join(["python", "tests/faults/fuzz.py", *sys.argv[1:]])
    found["seed"] = args.seed
    for campaign in args.only or CAMPAIGNS:
        found[campaign] = run_campaign(campaign, args.share, args.seed)
        write_json(args.out, found)
    for text in list_problems(found):
        print(text)
    print("problems:", len(list_problems(found)))
