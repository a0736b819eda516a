"""Commands as users type them: every mistake gives one paragraph and an exit code, and no file.

Interrupted commands continue when they are run again. Commands run inside this process, through
the console script's `main`; where a signal is needed, in a process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pyarrow.parquet as pq
import pytest
import torch
import typer
from cli.runner import assert_refused, run
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusion2gan import cli
from diffusion2gan.errors import Failure
from diffusion2gan.pairs import check, store
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write, sha256

NUM_PAIRS = 12
SHARD_SIZE = 4


def pairs_command(teacher: Path, out: Path, *more: object) -> list[object]:
    """Makes twelve pairs in three shards."""
    return [
        "pairs",
        *("--teacher", teacher, "--prompts", "pocket", "--out", out),
        *("--count", NUM_PAIRS, "--shard-size", SHARD_SIZE),
        *("--num-inference-steps", 2, "--guidance-scale", 1),
        *more,
    ]


def distill_command(teacher: Path, pairs: Path, out: Path, *settings: str) -> list[object]:
    """Trains two steps of four pairs."""
    command: list[object] = ["distill", "pocket-regression", "--pairs", pairs, "--out", out]
    for setting in (
        f"teacher={teacher}",
        "loss=mse",
        "total_pairs=8",
        "batch_size=4",
        *settings,
    ):
        command += ["--set", setting]
    return command


def temporary_files(folder: Path) -> list[str]:
    """Names of files that an interrupted write left behind."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.name.endswith((".tmp", ".old")) or ".tmp." in path.name
    ]


def read_latents(folder: Path) -> torch.Tensor:
    spec = store.open_set(folder)
    return torch.cat([store.read_shard(folder, shard).latents for shard in range(spec.num_shards)])


@contextlib.contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond `num_bytes`: a full disk without root (EFBIG in place of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def shared_pairs(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete set of pairs. Tests must not change it: they copy it."""
    folder = tmp_path_factory.mktemp("shared") / "pairs"
    result = run(*pairs_command(tiny_teacher, folder))
    assert result.code == 0, result
    return folder


@pytest.fixture
def copied_pairs(shared_pairs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_pairs, tmp_path / "pairs"))


@pytest.fixture(scope="module")
def unsupported_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unsupported")
    (folder / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    return folder


# Command lines


@pytest.mark.parametrize(
    ("argv", "phrases"),
    [
        (["distil"], ["No such command 'distil'", "'distill'"]),
        (["pairs", "verfy", "x"], ["No such command 'verfy'", "'verify'"]),
        (["pairs", "--cout", "3"], ["No such option: --cout", "--count"]),
        (["pairs", "--count", "many"], ["--count", "valid integer"]),
        (["pairs", "--seed", "256", "--out", "x"], ["--seed", "less than or equal to 255"]),
        (["generate", "pocket-student", "--out", "x.png"], ["Missing option", "--prompt"]),
        (["pairs"], ["--out is missing"]),
        (["pairs", "--precision", "float16", "--out", "x"], ["float16 needs a GPU", "float32"]),
        (
            ["pairs", "--solver", "dpmpp", "--out", "x"],
            ["unknown solver 'dpmpp'", "did you mean 'dpm++'"],
        ),
        (
            ["distill", "poket", "--pairs", "x", "--out", "y"],
            ["no recipe 'poket'", "did you mean 'pocket'"],
        ),
        (
            ["pairs", "info", "nowhere"],
            ["nowhere contains no pairs", "diffusion2gan pairs --out nowhere"],
        ),
        (["pairs", "verify", "nowhere"], ["nowhere contains no pairs"]),
        (["export", "nowhere", "--out", "y"], ["nowhere contains no run", "diffusion2gan distill"]),
        (["serve"], ["name a student", "--vote A B: one of the two"]),
        (["serve", "pocket-student", "--vote", "a", "b"], ["one of the two"]),
        (["serve", "--vote", "a", "b"], ["--vote needs --prompts"]),
        (["serve", "pocket-student", "--port", "70000"], ["--port", "65535"]),
        (["votes", "nowhere.jsonl"], ["no votes in nowhere.jsonl", "diffusion2gan serve --vote"]),
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], phrases: list[str]) -> None:
    assert_refused(run(*argv), 2, *phrases)


def find_path_parameters(
    group: typer.Typer = cli.app, prefix: tuple[str, ...] = ()
) -> Iterator[list[str]]:
    """Each command with each of its local paths, as typed: `["distill", "--out"]`, `["export"]`.

    An option is given by its name, a positional argument by nothing.
    """
    for info in group.registered_commands:
        command = [*prefix, info.name or info.callback.__name__]
        for name, hint in get_type_hints(info.callback, include_extras=True).items():
            kind, *parameters = get_args(hint) or (hint,)
            if kind is not Path and Path not in get_args(kind):
                continue
            is_argument = isinstance(parameters[0], type(typer.Argument()))
            yield command if is_argument else [*command, "--" + name.replace("_", "-")]

    for subgroup in group.registered_groups:
        yield from find_path_parameters(subgroup.typer_instance, (*prefix, subgroup.name))


PATH_PARAMETERS = list(find_path_parameters())


def test_all_path_parameters_are_found() -> None:
    assert len(PATH_PARAMETERS) == 32
    for expected in (
        ["distill", "--out"],
        ["export"],
        ["pairs", "import"],
        ["pairs", "export", "--out"],
    ):
        assert expected in PATH_PARAMETERS


@pytest.mark.parametrize("command", PATH_PARAMETERS, ids=" ".join)
def test_a_url_is_refused_where_a_local_path_is_needed(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Path("s3://bucket/x")` would create a local folder `s3:`."""
    monkeypatch.chdir(tmp_path)
    result = run(*command, "s3://bucket/x")
    assert_refused(result, 2, "s3://bucket/x is a URL", "path on this machine", "distill --pairs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "phrases"),
    [
        ("los=mse", ["unknown setting 'los'", "did you mean 'loss'"]),
        ("learnin_rate=1", ["did you mean 'learning_rate'"]),
        ("loss=mze", ["loss = 'mze'", "'mse'", "'e_latent_lpips'"]),
        ("batch_size=0", ["batch_size = '0'", "greater than or equal to 1"]),
        ("batch_size", ["write it as key=value"]),
    ],
)
def test_wrong_settings_are_refused(setting: str, phrases: list[str], tmp_path: Path) -> None:
    result = run("distill", "pocket", "--pairs", "x", "--out", tmp_path / "y", "--set", setting)
    assert_refused(result, 2, *phrases)
    assert not list(tmp_path.iterdir())


def test_a_recipe_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("loss: mse")
    result = run("distill", recipe, "--pairs", "x", "--out", "y")
    assert_refused(result, 2, "mine.toml is not TOML")


# Teachers, prompts, systems


def test_folders_that_are_no_supported_pipeline_are_refused(
    unsupported_pipeline: Path, shared_pairs: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\n")
    for argv in (
        ["pairs", "--teacher", "{}", "--prompts", "starter", "--out", tmp_path / "p"],
        [
            *("distill", "pocket", "--pairs", shared_pairs, "--out", tmp_path / "r"),
            *("--set", "teacher={}"),
        ],
        ["generate", "{}", "--prompt", "a red ring", "--out", tmp_path / "x.png"],
        ["evaluate", "{}", "--out", tmp_path / "m.json"],
        ["compare", "--system", "one={}", "--prompts", prompts, "--out", tmp_path / "c"],
    ):
        missing = [str(arg).format(tmp_path / "nowhere") for arg in argv]
        assert_refused(run(*missing), 2, "nowhere is not a diffusers pipeline", "is not a folder")

        unsupported = [str(arg).format(unsupported_pipeline) for arg in argv]
        assert_refused(
            run(*unsupported),
            2,
            "is a KandinskyPipeline, which is not supported; supported: StableDiffusionPipeline",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (None, "no prompts file"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        ("ein roter Kreis für dich\n".encode("latin-1"), "is not UTF-8 (byte 17)"),
        (b"a red ring\n\na disc\n  \n", "has 2 blank lines (line 2, 4)"),
    ],
)
def test_unusable_prompt_files_are_refused(
    content: bytes | None, phrase: str, tmp_path: Path, unsupported_pipeline: Path
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)

    result = run("pairs", "--prompts", path, "--out", tmp_path / "p")
    assert_refused(result, 2, str(path), phrase)

    system = f"x={unsupported_pipeline}"
    result = run("compare", "--system", system, "--prompts", path, "--out", tmp_path / "c")
    assert_refused(result, 2, str(path), phrase)

    assert not (tmp_path / "p").exists() and not (tmp_path / "c").exists()


def test_too_long_prompts_are_truncated_with_one_warning(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    long = "a red ring and " * 8 + "a disc"
    path = tmp_path / "prompts.txt"
    path.write_text(f"{long}\na blue star\na {long}\na green moon\n")

    result = run(*pairs_command(tiny_teacher, tmp_path / "p", "--prompts", path, "--batch-size", 4))

    assert result.code == 0
    assert result.err.count("longer than the tokenizer's limit of 24 tokens") == 1
    assert "warning: 2 of 4 prompts" in result.err
    assert store.read_shard(tmp_path / "p", 0).prompts[0] == long  # stored in full


def test_wrong_systems_metrics_and_image_names_are_refused(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring\n")
    metrics = tmp_path / "m.json"

    compare = ("compare", "--prompts", prompts, "--out", tmp_path / "c")
    assert_refused(run(*compare, "--system", tiny_teacher), 2, "write it as NAME=PATH")
    twice = ("--system", f"a={tiny_teacher}", "--system", f"a={tiny_teacher}")
    assert_refused(run(*compare, *twice), 2, "--system a: this name is given twice")

    measured = (*compare, "--system", f"student={tiny_teacher}", "--metrics")
    assert_refused(run(*measured, "m.json"), 2, "--metrics 'm.json': write it as NAME=PATH")
    assert_refused(
        run(*measured, "studnt=m.json"),
        2,
        "there is no --system with this name",
        "did you mean 'student'",
    )
    assert_refused(run(*measured, f"student={metrics}"), 2, "no such file")
    metrics.write_text("[1]")
    assert_refused(run(*measured, f"student={metrics}"), 2, "does not contain the metrics")

    generate = ("generate", tiny_teacher, "--num-inference-steps", 1)
    result = run(*generate, "--prompt", "a disc", "--out", tmp_path / "x.txt")
    assert_refused(result, 2, "x.txt: the file's name must end with", ".png")
    result = run(*generate, "--prompt", " ", "--out", tmp_path / "x.png")
    assert_refused(result, 2, "a prompt is empty")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "prompts.txt"]


# Pairs and runs


def test_a_complete_set_is_not_written_again(copied_pairs: Path, tiny_teacher: Path) -> None:
    def state() -> dict[str, tuple[str, int]]:
        return {
            path.name: (sha256(path), path.stat().st_mtime_ns) for path in copied_pairs.iterdir()
        }

    before = state()
    assert run(*pairs_command(tiny_teacher, copied_pairs)).code == 0
    assert state() == before

    info = run("pairs", "info", copied_pairs)
    assert info.code == 0 and "made: 12 of 12 pairs, 3 of 3 shards" in info.out
    assert "solver: dpm++" in info.out


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (("--num-inference-steps", 3), "num_inference_steps: 2 in the folder, 3 requested"),
        (("--solver", "ddim"), "solver: 'dpm++' in the folder, 'ddim' requested"),
        (("--seed", 1), "seed: 0 in the folder, 1 requested"),
        (("--count", 13), "count: 12 in the folder, 13 requested"),
        (("--keep-noise",), "keep_noise: False in the folder, True requested"),
    ],
)
def test_pairs_with_other_settings_are_refused(
    shared_pairs: Path, tiny_teacher: Path, more: tuple[object, ...], difference: str
) -> None:
    result = run(*pairs_command(tiny_teacher, shared_pairs, *more))
    assert_refused(result, 2, "already contains other pairs", difference, "--out")


def test_a_truncated_shard_is_refused_and_made_again_once_deleted(
    copied_pairs: Path, shared_pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shard = copied_pairs / "pairs-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-700])

    # Both distill and verify name the damaged file.
    command = distill_command(tiny_teacher, copied_pairs, tmp_path / "run")
    assert_refused(run(*command), 1, "pairs-00001.parquet is damaged", "move it away")
    verified = run("pairs", "verify", copied_pairs)
    assert verified.code == 1
    assert "pairs-00001.parquet is damaged" in verified.err and "1 problems" in verified.err

    # Once it is deleted, the pairs command makes it again, with the same content.
    shard.unlink()
    assert_refused(run(*command), 2, "1 of 3 shards are missing (first: pairs-00001.parquet)")
    assert run(*pairs_command(tiny_teacher, copied_pairs)).code == 0
    assert run("pairs", "verify", copied_pairs).code == 0
    assert torch.equal(read_latents(copied_pairs), read_latents(shared_pairs))
    assert run(*command).code == 0


def test_verify_finds_a_flipped_bit_and_a_swapped_shard(copied_pairs: Path) -> None:
    """One bit, anywhere in the latents: decompression alone would not notice all of them.

    The page header before the latents has no checksum; it contains statistics that are not read.
    """
    shard = copied_pairs / "pairs-00002.parquet"
    content = shard.read_bytes()
    row_group = pq.ParquetFile(shard).metadata.row_group(0)
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    (latents,) = [column for column in columns if column.path_in_schema == "latents"]
    end = latents.data_page_offset + latents.total_compressed_size

    # A bit flipped in the last 6 000 bytes of about 8 000
    for position in range(end - 6000, end, 500):
        altered = bytearray(content)
        altered[position] ^= 0x10
        shard.write_bytes(altered)
        problems = check.verify(copied_pairs)
        assert any("pairs-00002.parquet" in problem for problem in problems), end - position

    result = run("pairs", "verify", copied_pairs)
    assert result.code == 1 and "Traceback" not in result.err
    assert "pairs-00002.parquet is damaged" in result.err

    # An intact shard in the position of another
    shutil.copy(copied_pairs / "pairs-00000.parquet", shard)
    result = run("pairs", "verify", copied_pairs)
    assert result.code == 1 and "its pairs are not 8…11" in result.err


def test_pairs_of_another_teacher_are_refused(
    shared_pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_teacher, tmp_path / "other"))
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"] += 1
    save_file(weights, path, {"format": "pt"})

    result = run(*distill_command(other, shared_pairs, tmp_path / "run"))
    assert_refused(
        result,
        2,
        *("were made by teacher", sha256(other)[:16], sha256(tiny_teacher)[:16]),
        f"--set teacher=PATH, the path of '{tiny_teacher.name}'",
        f"diffusion2gan pairs --teacher {other} --prompts FILE --out NEW_FOLDER",
    )
    result = run(*pairs_command(other, shared_pairs))
    assert_refused(result, 2, "already contains other pairs", "revision")
    assert not (tmp_path / "run").exists()


def test_recipe_whose_teacher_is_not_here_names_that_of_the_pairs(
    shared_pairs: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / tiny_teacher.name).symlink_to(tiny_teacher)
    monkeypatch.chdir(tmp_path)
    result = run("distill", "sd15", "--pairs", shared_pairs, "--out", "run")
    assert_refused(
        result,
        2,
        "sd15 is not a diffusers pipeline",
        f"made by teacher '{tiny_teacher.name}': to distil it, add --set teacher=tiny_teacher",
    )
    assert not (tmp_path / "run").exists()


def test_pairs_of_another_teacher_than_the_pocket_teacher_need_prompts(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    result = run("pairs", "--teacher", tiny_teacher, "--out", tmp_path / "p")
    assert_refused(result, 2, "--prompts is missing", "--prompts FILE", "--prompts starter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_next_command_of_pairs_runs_for_their_teacher(
    sd_style_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a name that needs quotes, a VAE and a resolution."""
    monkeypatch.chdir(tmp_path)
    Path("my models").mkdir()
    teacher = Path("my models", "one")
    teacher.symlink_to(sd_style_teacher)
    options = ["--vae", teacher / "vae", "--resolution", 32]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a cat"}\n{"text": "a cat"}\n{"text": ""}\n')
    made = run(*pairs_command(teacher, Path("p"), "--prompts", prompts, *options))
    assert made.code == 0, made
    printed = " ".join((made.out + made.err).split())
    assert "column 'text': 2 prompts (1 of them duplicates, which are kept; 1 rows" in printed

    words = shlex.split(made.out.partition("Next: diffusion2gan ")[2])
    recipe = "sd15" if importlib.util.find_spec("peft") is None else "sd15-lora-24gb"
    assert words[:2] == ["distill", recipe]
    short = ["--set", "total_pairs=4", "--set", "batch_size=4"]
    short += ["--set", "gradient_accumulation_steps=2", "--set", "lora_rank=2"]
    trained = run(*words, *short)
    assert trained.code == 0, trained
    assert Path("runs/NAME/checkpoint.safetensors").is_file()


def test_a_run_with_other_settings_is_refused_unless_the_change_is_allowed(
    shared_pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run(*distill_command(tiny_teacher, shared_pairs, folder)).code == 0
    weights = sha256(folder / "checkpoint.safetensors")

    # A setting that changes the result
    changed = distill_command(tiny_teacher, shared_pairs, folder, "learning_rate=0.5")
    assert_refused(
        run(*changed),
        2,
        "contains a run with different settings (learning_rate: 0.0003 in the run, 0.5 requested)",
    )

    # A setting that does not change the result: allowed with --allow-change
    steps = distill_command(tiny_teacher, shared_pairs, folder, "gradient_accumulation_steps=2")
    assert_refused(
        run(*steps),
        2,
        "gradient_accumulation_steps: 1 in the run, 2 requested",
        "can be allowed: --allow-change gradient_accumulation_steps",
    )
    assert_refused(
        run(*steps, "--allow-change", "learning_rate"),
        2,
        "--allow-change learning_rate: only device, gradient_accumulation_steps",
    )
    assert run(*steps, "--allow-change", "gradient_accumulation_steps").code == 0

    # A finished run stays as it is.
    again = run(*distill_command(tiny_teacher, shared_pairs, folder))
    assert again.code == 0 and "8 pairs seen" in again.out
    assert sha256(folder / "checkpoint.safetensors") == weights


def test_a_dry_run_writes_nothing(shared_pairs: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    result = run(*distill_command(tiny_teacher, shared_pairs, tmp_path / "run"), "--dry-run")
    assert result.code == 0 and "steps: 2" in result.out
    assert not (tmp_path / "run").exists()


def test_distill_prints_the_settings_that_differ_from_the_defaults(
    shared_pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    result = run(*distill_command(tiny_teacher, shared_pairs, tmp_path / "run"), "--dry-run")
    printed = [line.split(" = ")[0] for line in result.out.splitlines() if " = " in line]
    assert printed == ["teacher", "loss", "total_pairs", "batch_size", "adversarial_weight"]
    assert "loss = 'mse'" in result.out


def test_shard_ranges_merge_into_the_same_set(
    shared_pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    # Two ranges of shards in two folders
    for name, shard_range in (("a", "0:1"), ("b", "1:3")):
        command = pairs_command(tiny_teacher, tmp_path / name, "--shard-range", shard_range)
        result = run(*command)
        assert result.code == 0 and f"shards {shard_range} are finished" in result.out
    info = run("pairs", "info", tmp_path / "b").out
    assert "made: 8 of 12 pairs, 2 of 3 shards" in info
    assert "missing: 0" in info and "pace: " in info

    # Merged, they are the set that one command makes.
    merged = tmp_path / "merged"
    result = run("pairs", "merge", tmp_path / "a", tmp_path / "b", "--out", merged)
    assert result.code == 0 and "3 of 3 shards" in result.out
    torch.testing.assert_close(read_latents(merged), read_latents(shared_pairs))
    verified = run("pairs", "verify", merged, "--deep", 2, "--teacher", tiny_teacher)
    assert verified.code == 0 and "all 12 pairs are valid" in verified.out

    for shard_range, phrases in (
        ("2", ("--shard-range '2'", "A:B")),
        ("2:9", ("shards 0 to 2", "0:3")),
    ):
        command = pairs_command(tiny_teacher, tmp_path / "c", "--shard-range", shard_range)
        assert_refused(run(*command), 2, *phrases)


def test_pairs_survive_export_and_import(shared_pairs: Path, tmp_path: Path) -> None:
    exported = run("pairs", "export", shared_pairs, "--out", tmp_path / "tars")
    assert exported.code == 0 and "3 tar files" in exported.out
    imported = run("pairs", "import", tmp_path / "tars", "--out", tmp_path / "imported")
    assert imported.code == 0 and "3 shards" in imported.out
    assert torch.equal(read_latents(tmp_path / "imported"), read_latents(shared_pairs))

    result = run("pairs", "export", shared_pairs, "--out", tmp_path / "x", "--format", "tar")
    assert_refused(result, 2, "only webdataset is supported")
    assert_refused(run("pairs", "info", "nowhere://x"), 2, "Protocol not known")


def test_deep_verification_needs_the_vae_and_resolution_of_the_set(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    # A set made with another VAE and resolution
    vae = AutoencoderKL.from_pretrained(tiny_teacher / "vae")
    for parameter in vae.parameters():
        parameter.data += 0.01
    vae.save_pretrained(tmp_path / "vae")
    options = ["--vae", tmp_path / "vae", "--resolution", 32, "--device", "cpu"]
    assert run(*pairs_command(tiny_teacher, tmp_path / "set", *options)).code == 0

    verify = ["pairs", "verify", tmp_path / "set", "--deep", 2, "--teacher", tiny_teacher]
    verified = run(*verify, *options)
    assert verified.code == 0 and "all 12 pairs are valid" in verified.out, verified
    assert_refused(run(*verify), 2, "was made by teacher", "--vae")
    assert_refused(
        run(*verify, "--vae", tmp_path / "vae"),
        2,
        "has latents of shape (4, 8, 8)",
        "the teacher's have",
        "--resolution",
    )


# Plans


def test_plan_names_its_model_and_estimates_pairs_and_training() -> None:
    pocket = run("plan", "pocket", "--gpus", 8)
    assert pocket.code == 0
    assert "pairs.pairs_per_s" in pocket.out and "distill.hours" in pocket.out
    assert "model: sd15 (assumed: the recipe's teacher 'pocket'" in pocket.out

    sdxl = run("plan", "sdxl", "--gpus", 8)
    assert sdxl.code == 0 and "model: sdxl (the recipe's teacher)" in sdxl.out
    named = run("plan", "sdxl", "--gpus", 8, "--set", "strategy=fsdp", "--model", "sdxl")
    assert named.code == 0 and "model: sdxl (--model)" in named.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # The paper's GPUs, more than the micro-batches of the recipe can be divided over
        (
            "sd15 --gpus 64 --gpu h100",
            "1 (the fewest micro-batches that fit in memory; the recipe has 32)",
        ),
        (
            "sdxl --gpus 8",
            "64 (nothing fits in memory, so one pair per micro-batch; the recipe has 128)",
        ),
        ("sdxl --gpus 8 --set strategy=fsdp", "16 (the fewest micro-batches that fit"),
        ("sd15 --gpus 8 --set gradient_accumulation_steps=16", "16 (--set)"),
    ],
)
def test_plan_chooses_micro_batches_that_fit(arguments: str, expected: str) -> None:
    result = run("plan", *arguments.split())
    assert result.code == 0
    assert f"gradient_accumulation_steps: {expected}" in result.out


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (
            "pocket --gpus 64",
            [
                "batch_size 16 cannot be split evenly over 64 GPUs",
                "1, 2, 4, 8, 16;",
                "a multiple of 64",
            ],
        ),
        ("sd15-lora-24gb", ["lora_rank = 64", "counts full training only"]),
        ("pocket --gpu h1000", ["did you mean 'h100'"]),
    ],
)
def test_plan_refuses_what_it_cannot_estimate(arguments: str, phrases: list[str]) -> None:
    assert_refused(run("plan", *arguments.split()), 2, *phrases)


# Full disks, interruptions


def test_pairs_continue_after_a_full_disk(
    shared_pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    command = pairs_command(tiny_teacher, tmp_path / "p")
    with limited_file_size(4000):  # the description fits, a shard of 8 KB does not
        result = run(*command)
    assert_refused(result, 1, "pairs-00000.parquet", "disk is full", "same command again")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["pairs.json"]

    assert run(*command).code == 0
    assert torch.equal(read_latents(tmp_path / "p"), read_latents(shared_pairs))


def test_distill_and_export_continue_after_a_full_disk(
    shared_pairs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    distill = distill_command(tiny_teacher, shared_pairs, tmp_path / "run")
    with limited_file_size(50_000):
        result = run(*distill)
    assert_refused(result, 1, "checkpoint.safetensors", "disk is full", "same command again")
    assert temporary_files(tmp_path) == []
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()

    # Steps that are made again are logged once.
    assert run(*distill).code == 0
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2

    export = ("export", tmp_path / "run", "--out", tmp_path / "student")
    with limited_file_size(50_000):
        result = run(*export)
    assert_refused(result, 1, "disk is full", "student")
    assert temporary_files(tmp_path) == [] and not (tmp_path / "student").exists()
    assert run(*export).code == 0 and (tmp_path / "student" / "model_index.json").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_existing_files_survive_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """ENOSPC itself, on a disk of 1 MB: what was there stays, and the message names the remedy."""
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


# `pairs`, which gets a SIGINT once the second shard is written.
INTERRUPTED = """
import os, signal
from diffusion2gan import cli
from diffusion2gan.pairs import make
original = make.write_shard

def write_shard(folder, shard, *arguments):
    original(folder, shard, *arguments)
    if shard == 1:
        os.kill(os.getpid(), signal.SIGINT)

make.write_shard = write_shard
cli.main()
"""


def test_pairs_continue_after_ctrl_c(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    command = pairs_command(tiny_teacher, folder, "--count", 240, "--batch-size", 4)

    # SIGINT after the second of 60 shards
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, command)],
        capture_output=True,
        text=True,
        # SIGINT is ignored in the background jobs of a shell: the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    out, err = process.stdout, process.stderr
    assert process.returncode == 130, (process.returncode, err)
    assert "Traceback" not in out + err, err

    # The finished shards are complete.
    finished = sorted(folder.glob("*.parquet"))
    assert len(finished) == 2 and temporary_files(folder) == []
    for shard in range(len(finished)):
        assert len(store.read_shard(folder, shard)) == SHARD_SIZE

    # The second run keeps them and makes the others.
    before = {path: path.stat().st_mtime_ns for path in finished}
    assert run(*command).code == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    assert run("pairs", "verify", folder).code == 0


# Perceptual networks


def test_wrong_perceptual_arguments_are_refused(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")

    fit = ("perceptual", "fit", "--images", tmp_path, *out)
    assert_refused(run(*fit), 2, "--vae", "--pixels", "one of the two")
    assert_refused(run(*fit, "--pixels", "--vae", "pocket"), 2, "one of the two")
    assert_refused(
        run(*fit, "--pixels", "--widths", "8,x,8,8,8"), 2, "--widths '8,x,8,8,8'", "five numbers"
    )
    assert_refused(run(*fit, "--pixels"), 2, "has 0 classes of images")

    result = run("perceptual", "import", tmp_path / "x", "--format", "snu", *out)
    assert_refused(result, 2, "no such file")

    network = ("--network", "pocket", "--vae", "pocket")
    result = run("perceptual", "calibrate", "--triplets", tmp_path / "x", *network, *out)
    assert_refused(result, 2, "no folder of triplets")

    assert not list(tmp_path.iterdir())


def test_the_command_that_pocket_triplets_suggests_calibrates_a_network(tmp_path: Path) -> None:
    written = run("pocket", "triplets", "--out", tmp_path / "triplets", "--count", 2)
    assert written.code == 0, written
    suggestion = written.out.partition("Next: diffusion2gan ")[2]
    command = suggestion.replace("NAME", str(tmp_path / "network")).split()
    assert command[:2] == ["perceptual", "calibrate"]

    calibrated = run(*command, "--epochs", 1)
    assert calibrated.code == 0, calibrated
    scores = re.findall(r"2AFC \d+\.\d\d% \(before: \d+\.\d\d%\), 1 triplets", calibrated.out)
    assert len(scores) == 6
    names = {path.name for path in (tmp_path / "network").iterdir()}
    assert names >= {"config.json", "model.safetensors", "README.md", "calibrate.json"}
    assert temporary_files(tmp_path) == []
