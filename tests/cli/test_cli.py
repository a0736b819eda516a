"""The command line as its users meet it: every mistake one paragraph and an exit code, nothing lost, run it again.

Commands run inside this process, through the console script's own `main`; a few in processes of their own.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import pyarrow.parquet as pq
import pytest
import torch
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusion2gan import cli
from diffusion2gan.errors import Failure
from diffusion2gan.pairs import check, store
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write, sha256

COUNT, SHARD = 12, 4
VERBS = (
    [],
    ["pairs"],
    ["pairs", "info"],
    ["pairs", "verify"],
    ["pairs", "merge"],
    ["pairs", "export"],
    ["pairs", "import"],
    ["recipe"],
    ["recipe", "list"],
    ["recipe", "show"],
    ["plan"],
    ["distill"],
    ["export"],
    ["generate"],
    ["evaluate"],
    ["compare"],
    ["serve"],
    ["votes"],
    ["demo"],
    ["perceptual"],
    ["perceptual", "fit"],
    ["perceptual", "calibrate"],
    ["perceptual", "import"],
    ["pocket"],
    ["pocket", "train"],
    ["pocket", "triplets"],
)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run(*argv: object) -> Ran:
    """`diffusion2gan ARGV…` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, term = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["diffusion2gan", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, term)
    return Ran(code, out.getvalue(), err.getvalue())


def refused(ran: Ran, code: int, *told: str) -> None:
    """Exit code `code`, one paragraph that tells all of `told`, no traceback."""
    assert ran.code == code, ran
    assert "Traceback" not in ran.err + ran.out
    message = re.split(r"^error: ", ran.err, flags=re.IGNORECASE | re.MULTILINE)
    assert len(message) == 2, ran.err
    paragraph = message[1].strip()
    assert "\n\n" not in paragraph and 10 < len(paragraph) < 1200
    for words in told:
        assert words in " ".join(paragraph.split()), (words, paragraph)


def pairs_args(teacher: Path, out: Path, *more: object) -> list[object]:
    base = ["pairs", "--teacher", teacher, "--out", out, "--count", COUNT, "--shard-size", SHARD]
    return [*base, "--num-inference-steps", 2, "--guidance-scale", 1, *more]


def distill_args(teacher: Path, pairs: Path, out: Path, *settings: str) -> list[object]:
    tiny = (f"teacher={teacher}", "loss=mse", "total_pairs=8", "batch_size=4", *settings)
    return [
        "distill",
        "pocket-regression",
        "--pairs",
        pairs,
        "--out",
        out,
        *[x for s in tiny for x in ("--set", s)],
    ]


def leftovers(folder: Path) -> list[str]:
    return [
        path.name
        for path in folder.rglob("*")
        if path.name.endswith((".tmp", ".old")) or ".tmp." in path.name
    ]


def latents(folder: Path) -> torch.Tensor:
    spec = store.open_set(folder)
    return torch.cat([store.read_shard(folder, shard).latents for shard in range(spec.num_shards)])


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a full disk that needs no root (EFBIG in place of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def made(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of pairs. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    ran = run(*pairs_args(tiny_teacher, folder))
    assert ran.code == 0, ran
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pairs"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    return folder


# ------------------------------------------------------------------------------------------------ the words typed


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["distil"], ["No such command 'distil'", "'distill'"]),
        (["pairs", "verfy", "x"], ["No such command 'verfy'", "'verify'"]),
        (["pairs", "--cout", "3"], ["No such option: --cout", "--count"]),
        (["pairs", "--count", "many"], ["--count", "valid integer"]),
        (["pairs", "--seed", "256", "--out", "x"], ["--seed", "less than or equal to 255"]),
        (["generate", "pocket-student", "--out", "x.png"], ["Missing option", "--prompt"]),
        (["pairs"], ["--out is missing"]),
        (
            ["distill", "poket", "--pairs", "x", "--out", "y"],
            ["no recipe 'poket'", "did you mean 'pocket'"],
        ),
        (
            ["pairs", "info", "nowhere"],
            ["nowhere holds no pairs", "diffusion2gan pairs --out nowhere"],
        ),
        (["pairs", "verify", "nowhere"], ["nowhere holds no pairs"]),
        (["export", "nowhere", "--out", "y"], ["nowhere holds no run", "diffusion2gan distill"]),
        (["serve"], ["name a student", "--vote A B: one of the two"]),
        (["serve", "pocket-student", "--vote", "a", "b"], ["one of the two"]),
        (["serve", "--vote", "a", "b"], ["--vote needs --prompts"]),
        (["serve", "pocket-student", "--port", "70000"], ["--port", "65535"]),
        (["votes", "nowhere.jsonl"], ["no votes in nowhere.jsonl", "diffusion2gan serve --vote"]),
    ],
)
def test_wrong_words(argv: list[str], told: list[str]) -> None:
    refused(run(*argv), 2, *told)


def paths(app: typer.Typer = cli.app, verbs: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Every command with each of its paths, as it is typed: an option's name, or nothing for the argument."""
    for info in app.registered_commands:
        verb = [*verbs, info.name or info.callback.__name__]
        for name, hint in get_type_hints(info.callback, include_extras=True).items():
            kind, *about = get_args(hint) or (hint,)
            if kind is Path or Path in get_args(kind):
                yield verb if isinstance(about[0], type(typer.Argument())) else [*verb, f"--{name}"]
    for group in app.registered_groups:
        yield from paths(group.typer_instance, (*verbs, group.name))


PATHS = list(paths())


def test_all_paths_are_found() -> None:
    assert len(PATHS) == 27 and ["distill", "--out"] in PATHS and ["export"] in PATHS
    assert ["pairs", "import"] in PATHS and ["pairs", "export", "--out"] in PATHS


@pytest.mark.parametrize("typed", PATHS, ids=" ".join)
def test_a_url_is_no_path(
    typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Path` would make a folder `s3:` of it here."""
    monkeypatch.chdir(tmp_path)
    refused(
        run(*typed, "s3://bucket/x"),
        2,
        "s3://bucket/x is a URL",
        "path on this machine",
        "distill --pairs",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("los=mse", ["unknown setting 'los'", "did you mean 'loss'"]),
        ("learnin_rate=1", ["did you mean 'learning_rate'"]),
        ("loss=mze", ["loss = 'mze'", "'mse'", "'e_latent_lpips'"]),
        ("batch_size=0", ["batch_size = '0'", "greater than or equal to 1"]),
        ("batch_size", ["write it as key=value"]),
    ],
)
def test_wrong_settings(setting: str, told: list[str], tmp_path: Path) -> None:
    refused(
        run("distill", "pocket", "--pairs", "x", "--out", tmp_path / "y", "--set", setting),
        2,
        *told,
    )
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_no_toml(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("loss: mse")
    refused(
        run("distill", tmp_path / "mine.toml", "--pairs", "x", "--out", "y"),
        2,
        "mine.toml is not TOML",
    )


def test_help_needs_no_torch() -> None:
    """All verbs in one process in which torch, diffusers and transformers cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'pyarrow'): sys.modules[name] = None\n"
        "from diffusion2gan.cli import main\n"
        f"for verb in {list(VERBS)!r}:\n"
        "    sys.argv = ['diffusion2gan', *verb, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as e: print('CODE', e.code)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.count("CODE 0") == ran.stdout.count("Usage: ") == len(VERBS), ran.stderr
    assert ran.stderr == ""


def test_exit_code_of_a_process() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "diffusion2gan", "distil"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    refused(Ran(ran.returncode, ran.stdout, ran.stderr), 2, "'distill'")


# ------------------------------------------------------------------------------------- teachers, prompts, systems


def test_folders_that_are_no_teacher(foreign: Path, made: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\n")
    for argv in (
        ["pairs", "--teacher", "{}", "--out", tmp_path / "p"],
        ["distill", "pocket", "--pairs", made, "--out", tmp_path / "r", "--set", "teacher={}"],
        ["generate", "{}", "--prompt", "a red ring", "--out", tmp_path / "x.png"],
        ["evaluate", "{}", "--out", tmp_path / "m.json"],
        ["compare", "--system", "one={}", "--prompts", prompts, "--out", tmp_path / "c"],
    ):
        missing = [str(arg).format(tmp_path / "nowhere") for arg in argv]
        refused(run(*missing), 2, "nowhere is no diffusers pipeline", "is not a folder")
        other = [str(arg).format(foreign) for arg in argv]
        refused(
            run(*other),
            2,
            "is a KandinskyPipeline, which is not supported; supported: StableDiffusionPipeline",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no prompts file"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        ("ein roter Kreis für dich\n".encode("latin-1"), "is not UTF-8 (byte 17)"),
        (b"a red ring\n\na disc\n  \n", "has 2 blank lines (line 2, 4)"),
    ],
)
def test_prompt_files(content: bytes | None, told: str, tmp_path: Path, foreign: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    refused(run("pairs", "--prompts", path, "--out", tmp_path / "p"), 2, str(path), told)
    refused(
        run("compare", "--system", f"x={foreign}", "--prompts", path, "--out", tmp_path / "c"),
        2,
        str(path),
        told,
    )
    assert not (tmp_path / "p").exists() and not (tmp_path / "c").exists()


def test_too_long_prompts_are_cut_and_told_once(tiny_teacher: Path, tmp_path: Path) -> None:
    long = "a red ring and " * 8 + "a disc"
    path = tmp_path / "prompts.txt"
    path.write_text(f"{long}\na blue star\na {long}\na green moon\n")
    ran = run(*pairs_args(tiny_teacher, tmp_path / "p", "--prompts", path, "--batch-size", 4))
    assert ran.code == 0 and ran.err.count("longer than the tokenizer's 24 tokens") == 1
    assert "warning: 2 of 4 prompts" in ran.err
    assert store.read_shard(tmp_path / "p", 0).prompts[0] == long  # the set keeps what was asked


def test_wrong_systems_and_pictures(tiny_teacher: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\n")
    compare = ("compare", "--prompts", prompts, "--out", tmp_path / "c")
    refused(run(*compare, "--system", tiny_teacher), 2, "write it as NAME=PATH")
    measured = ("--system", f"student={tiny_teacher}", "--metrics")
    refused(run(*compare, *measured, "m.json"), 2, "--metrics 'm.json': write it as NAME=PATH")
    refused(
        run(*compare, *measured, "studnt=m.json"),
        2,
        "no --system has this name",
        "did you mean 'student'",
    )
    refused(run(*compare, *measured, f"student={tmp_path / 'm.json'}"), 2, "no such file")
    (tmp_path / "m.json").write_text("[1]")
    refused(run(*compare, *measured, f"student={tmp_path / 'm.json'}"), 2, "holds no metrics")
    twice = ("--system", f"a={tiny_teacher}", "--system", f"a={tiny_teacher}")
    refused(run(*compare, *twice), 2, "--system a: given twice")
    generate = ("generate", tiny_teacher, "--num-inference-steps", 1)
    refused(
        run(*generate, "--prompt", "a disc", "--out", tmp_path / "x.txt"),
        2,
        "name a picture file (.png",
    )
    refused(run(*generate, "--prompt", " ", "--out", tmp_path / "x.png"), 2, "a prompt is empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "prompts.txt"]


# ------------------------------------------------------------------------------------------------ pairs and runs


def test_pairs_run_again(copied: Path, tiny_teacher: Path) -> None:
    before = {path.name: (sha256(path), path.stat().st_mtime_ns) for path in copied.iterdir()}
    assert run(*pairs_args(tiny_teacher, copied)).code == 0
    assert {
        path.name: (sha256(path), path.stat().st_mtime_ns) for path in copied.iterdir()
    } == before
    told = run("pairs", "info", copied)
    assert told.code == 0 and "made: 12 of 12 pairs, 3 of 3 shards" in told.out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--num-inference-steps", 3), "num_inference_steps: 2 there, 3 asked"),
        (("--seed", 1), "seed: 0 there, 1 asked"),
        (("--count", 13), "count: 12 there, 13 asked"),
        (("--keep-noise",), "keep_noise: False there, True asked"),
    ],
)
def test_pairs_of_other_settings(
    made: Path, tiny_teacher: Path, more: tuple[object, ...], told: str
) -> None:
    refused(
        run(*pairs_args(tiny_teacher, made, *more)), 2, "already holds other pairs", told, "--out"
    )


def test_a_truncated_shard_is_told_and_made_again(
    copied: Path, made: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shard = copied / "pairs-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-700])
    command = distill_args(tiny_teacher, copied, tmp_path / "run")
    refused(run(*command), 1, "pairs-00001.parquet is damaged", "Delete that file")
    verified = run("pairs", "verify", copied)
    assert (
        verified.code == 1
        and "pairs-00001.parquet is damaged" in verified.err
        and "1 problems" in verified.err
    )
    shard.unlink()
    refused(run(*command), 2, "1 of 3 shards are missing (first: pairs-00001.parquet)")
    assert run(*pairs_args(tiny_teacher, copied)).code == 0
    assert run("pairs", "verify", copied).code == 0
    assert torch.equal(latents(copied), latents(made))
    assert run(*command).code == 0


def test_an_altered_shard_is_told(copied: Path) -> None:
    """One bit, anywhere in the latents: compression alone would let some of them through.

    The page's header before them is not checksummed; it holds statistics, which nobody reads.
    """
    shard = copied / "pairs-00002.parquet"
    content = shard.read_bytes()
    group = pq.ParquetFile(shard).metadata.row_group(0)
    column = next(
        group.column(i)
        for i in range(group.num_columns)
        if group.column(i).path_in_schema == "latents"
    )
    end = column.data_page_offset + column.total_compressed_size
    for place in range(end - 6000, end, 500):  # of 8 KB
        altered = bytearray(content)
        altered[place] ^= 0x10
        shard.write_bytes(altered)
        assert any("pairs-00002.parquet" in problem for problem in check.verify(copied)), (
            end - place
        )
    ran = run("pairs", "verify", copied)
    assert (
        ran.code == 1 and "pairs-00002.parquet is damaged" in ran.err and "Traceback" not in ran.err
    )
    shutil.copy(copied / "pairs-00000.parquet", shard)  # whole, but another's place
    ran = run("pairs", "verify", copied)
    assert ran.code == 1 and "its pairs are not 8…11" in ran.err


def test_pairs_of_another_teacher(made: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] += 1
    save_file(weights, path, {"format": "pt"})
    command = distill_args(other, made, tmp_path / "run")
    refused(run(*command), 2, "were made by teacher", sha256(other)[:16], sha256(tiny_teacher)[:16])
    refused(run(*pairs_args(other, made)), 2, "already holds other pairs", "revision")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_recipe(made: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(*distill_args(tiny_teacher, made, folder)).code == 0
    kept = sha256(folder / "checkpoint.safetensors")
    changed = distill_args(tiny_teacher, made, folder, "learning_rate=0.5")
    refused(
        run(*changed), 2, "holds a run of another recipe (learning_rate: 0.0003 there, 0.5 asked)"
    )
    parts = distill_args(tiny_teacher, made, folder, "gradient_accumulation_steps=2")
    refused(
        run(*parts),
        2,
        "gradient_accumulation_steps: 1 there, 2 asked",
        "or allow it: --allow-change gradient_accumulation_steps",
    )
    refused(
        run(*parts, "--allow-change", "learning_rate"),
        2,
        "--allow-change learning_rate: only device, gradient_accumulation_steps",
    )
    assert run(*parts, "--allow-change", "gradient_accumulation_steps").code == 0
    again = run(*distill_args(tiny_teacher, made, folder))
    assert again.code == 0 and "8 pairs seen" in again.out
    assert sha256(folder / "checkpoint.safetensors") == kept


def test_dry_run_writes_nothing(made: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    ran = run(*distill_args(tiny_teacher, made, tmp_path / "run"), "--dry-run")
    assert ran.code == 0 and "steps: 2" in ran.out and "loss = 'mse'" in ran.out
    assert not (tmp_path / "run").exists()


def test_ranges_merges_and_exports(made: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    for name, part in (("a", "0:1"), ("b", "1:3")):
        ran = run(*pairs_args(tiny_teacher, tmp_path / name, "--shard-range", part))
        assert ran.code == 0 and f"shards {part} are there" in ran.out
    told = run("pairs", "info", tmp_path / "b").out
    assert (
        "made: 8 of 12 pairs, 2 of 3 shards" in told and "missing: 0" in told and "pace: " in told
    )
    merged = run("pairs", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "whole")
    assert merged.code == 0 and "3 of 3 shards" in merged.out
    torch.testing.assert_close(latents(tmp_path / "whole"), latents(made))
    verified = run("pairs", "verify", tmp_path / "whole", "--deep", 2, "--teacher", tiny_teacher)
    assert verified.code == 0 and "all 12 pairs are well" in verified.out
    assert "3 tar files" in run("pairs", "export", made, "--out", tmp_path / "tars").out
    assert "3 shards" in run("pairs", "import", tmp_path / "tars", "--out", tmp_path / "back").out
    assert torch.equal(latents(tmp_path / "back"), latents(made))
    refused(
        run(*pairs_args(tiny_teacher, tmp_path / "c", "--shard-range", "2")),
        2,
        "--shard-range '2'",
        "A:B",
    )
    refused(
        run(*pairs_args(tiny_teacher, tmp_path / "c", "--shard-range", "2:9")),
        2,
        "shards 0 to 2",
        "0:3",
    )
    refused(
        run("pairs", "export", made, "--out", tmp_path / "x", "--format", "tar"),
        2,
        "only webdataset is known",
    )
    refused(run("pairs", "info", "nowhere://x"), 2, "Protocol not known")


def test_a_set_of_another_vae_and_resolution_is_solved_anew(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    other = AutoencoderKL.from_pretrained(tiny_teacher / "vae")
    for parameter in other.parameters():
        parameter.data += 0.01
    other.save_pretrained(tmp_path / "vae")
    given = ["--vae", tmp_path / "vae", "--resolution", 32, "--device", "cpu"]
    assert run(*pairs_args(tiny_teacher, tmp_path / "set", *given)).code == 0
    verify = ["pairs", "verify", tmp_path / "set", "--deep", 2, "--teacher", tiny_teacher]
    verified = run(*verify, *given)
    assert verified.code == 0 and "all 12 pairs are well" in verified.out, verified
    refused(run(*verify), 2, "was made by teacher", "--vae")
    refused(
        run(*verify, *given[:2]), 2, "has latents of (4, 8, 8)", "the teacher's are", "--resolution"
    )


def test_a_plan(tmp_path: Path) -> None:
    ran = run("plan", "pocket", "--gpus", 8)
    assert ran.code == 0 and "pairs.pairs_per_s" in ran.out and "distill.hours" in ran.out
    assert "model: sd15 (assumed: the recipe's teacher 'pocket'" in ran.out
    paper = run(
        "plan", "sd15", "--gpus", 64, "--gpu", "h100"
    )  # the paper's GPUs, more than the recipe's parts take
    assert (
        paper.code == 0
        and "gradient_accumulation_steps: 1 (the fewest micro-batches that fit in memory; the recipe has 32)"
        in paper.out
    )
    sdxl = run("plan", "sdxl", "--gpus", 8)
    assert sdxl.code == 0 and "model: sdxl (the recipe's teacher)" in sdxl.out
    assert (
        "gradient_accumulation_steps: 64 (nothing fits in memory, so one pair per micro-batch; the recipe has 128)"
        in sdxl.out
    )
    cut = run("plan", "sdxl", "--gpus", 8, "--set", "strategy=fsdp", "--model", "sdxl")
    assert (
        "gradient_accumulation_steps: 16 (the fewest" in cut.out
        and "model: sdxl (--model)" in cut.out
    )
    given = run("plan", "sd15", "--gpus", 8, "--set", "gradient_accumulation_steps=16")
    assert given.code == 0 and "gradient_accumulation_steps: 16 (--set)" in given.out
    told = ("batch_size 16 cannot be cut over 64 GPUs", "1, 2, 4, 8, 16;", "a multiple of 64")
    refused(run("plan", "pocket", "--gpus", 64), 2, *told)
    refused(run("plan", "sd15-lora-24gb"), 2, "lora_rank = 64", "counts full training only")
    refused(run("plan", "pocket", "--gpu", "h1000"), 2, "did you mean 'h100'")


# ------------------------------------------------------------------------------------- full disks, interruptions


def test_a_full_disk_under_pairs(made: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    command = pairs_args(tiny_teacher, tmp_path / "p")
    with small_files(4000):  # the description fits, a shard of 8 KB does not
        ran = run(*command)
    refused(ran, 1, "pairs-00000.parquet", "disk is full", "same command again")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["pairs.json"]
    assert run(*command).code == 0
    assert torch.equal(latents(tmp_path / "p"), latents(made))


def test_a_full_disk_under_distill_and_export(
    made: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    command = distill_args(tiny_teacher, made, tmp_path / "run")
    with small_files(50_000):
        ran = run(*command)
    refused(ran, 1, "checkpoint.safetensors", "disk is full", "same command again")
    assert leftovers(tmp_path) == [] and not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert run(*command).code == 0
    assert (tmp_path / "run" / "log.jsonl").read_text().count(
        "\n"
    ) == 2  # steps made again are logged once

    export = ("export", tmp_path / "run", "--out", tmp_path / "student")
    with small_files(50_000):
        ran = run(*export)
    refused(ran, 1, "disk is full", "student")
    assert leftovers(tmp_path) == [] and not (tmp_path / "student").exists()
    assert run(*export).code == 0 and (tmp_path / "student" / "model_index.json").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """ENOSPC itself, on a disk of 1 MB: what was there stays, and the message says what to do."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        path = disk / "state.safetensors"
        checkpoint.save(path, {"x": torch.ones(1000)}, {"step": 1})
        with pytest.raises(Failure, match="the disk is full"):
            checkpoint.save(path, {"x": torch.ones(1_000_000)}, {"step": 2})
        assert checkpoint.load(path)[1] == {"step": 1}
        with (
            pytest.raises(Failure, match="the disk is full"),
            atomic_write(disk / "text") as temporary,
        ):
            temporary.write_bytes(bytes(2_000_000))
        assert [entry.name for entry in disk.iterdir()] == ["state.safetensors"]
        checkpoint.save(path, {"x": torch.ones(2000)}, {"step": 2})
        assert checkpoint.load(path)[1] == {"step": 2}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_and_again(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    command = pairs_args(tiny_teacher, folder, "--count", 240, "--batch-size", 4)
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusion2gan", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in background
    )
    try:
        end = time.monotonic() + 400
        while (
            not (folder / "pairs-00001.parquet").exists()
            and process.poll() is None
            and time.monotonic() < end
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode not in (0, None) and "Traceback" not in out + err, (
        process.returncode,
        err,
    )
    there = sorted(folder.glob("*.parquet"))
    assert 2 <= len(there) < 60 and leftovers(folder) == []
    before = {path: path.stat().st_mtime_ns for path in there}
    for shard in range(len(there)):
        assert len(store.read_shard(folder, shard)) == SHARD
    assert run(*command).code == 0
    assert {path: path.stat().st_mtime_ns for path in there} == before  # kept, not made again
    assert run("pairs", "verify", folder).code == 0


# ------------------------------------------------------------------------------------------------ perceptual networks


def test_perceptual_words(tmp_path: Path) -> None:
    base = ["perceptual", "fit", "--images", tmp_path, "--out", tmp_path / "out"]
    refused(run(*base), 2, "--vae", "--pixels", "one of the two")
    refused(run(*base, "--pixels", "--vae", "pocket"), 2, "one of the two")
    refused(
        run(*base, "--pixels", "--widths", "8,x,8,8,8"), 2, "--widths '8,x,8,8,8'", "five numbers"
    )
    refused(run(*base, "--pixels"), 2, "has 0 classes of pictures")
    out = ["--out", tmp_path / "out"]
    refused(run("perceptual", "import", tmp_path / "x", "--format", "snu", *out), 2, "no such file")
    pocket = ["--network", "pocket", "--vae", "pocket"]
    refused(
        run("perceptual", "calibrate", "--triplets", tmp_path / "x", *pocket, *out),
        2,
        "no folder of triplets",
    )
    assert not list(tmp_path.iterdir())


def test_triplets_calibrate_a_network(tmp_path: Path) -> None:
    made = run("pocket", "triplets", "--out", tmp_path / "triplets", "--count", 2)
    assert made.code == 0, made
    command = (
        made.out.partition("Next: diffusion2gan ")[2]
        .replace("NAME", str(tmp_path / "network"))
        .split()
    )
    assert command[:2] == ["perceptual", "calibrate"]
    done = run(*command, "--epochs", 1)
    assert done.code == 0, done
    assert len(re.findall(r"2AFC \d+\.\d\d% \(before: \d+\.\d\d%\), 1 triplets", done.out)) == 6
    assert {"config.json", "model.safetensors", "README.md", "calibrate.json"} <= {
        path.name for path in (tmp_path / "network").iterdir()
    }
    assert leftovers(tmp_path) == []
