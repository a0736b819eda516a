"""An exported folder, run by stock diffusers without this package, matches the student."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli import runner
from safetensors.torch import load_file, save_file

from diffusion2gan.distill.run import load_student
from diffusion2gan.distill.student import Student
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import UserError
from diffusion2gan.export import export, write_pipeline
from diffusion2gan.model_card import Contents, model_card
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.teacher.loading import load_teacher

PROMPTS = ["a red ring on a blue ground", "two stars"]
STYLES = ("tiny_teacher", "sd_style_teacher")
STOCK = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
noise, prompts = load_file(sys.argv[1])["noise"], sys.argv[2].split("|")
found = {}
for index, folder in enumerate(sys.argv[4:]):
    pipe = DiffusionPipeline.from_pretrained(folder)
    settings = {"latents": noise, "guidance_scale": 0}
    found[f"latents{index}"] = pipe(
        prompts, num_inference_steps=1, output_type="latent", **settings).images
    found[f"images{index}"] = pipe(
        prompts, num_inference_steps=1, output_type="pt", **settings).images
    try:
        pipe(prompts, num_inference_steps=2, **settings)
    except ValueError as error:
        print("refused:", error)
assert "diffusion2gan" not in sys.modules
save_file(found, sys.argv[3])
"""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of three steps per style: its averaged weights are not the teacher's nor the last."""
    root = tmp_path_factory.mktemp("runs")
    for style in STYLES:
        # Pairs
        folder = request.getfixturevalue(style)
        teacher = load_teacher(str(folder))
        spec = PairsSpec(
            teacher.name, teacher.revision, "words", 4, 0, 1, 1.0, teacher.latent_shape, 4
        )
        make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, root / style / "pairs")

        # Training
        recipe = Recipe(
            teacher=str(folder),
            loss="mse",
            total_pairs=6,
            batch_size=2,
            learning_rate=1e-3,
            adversarial_weight=0,
        )
        distill(recipe, root / style / "pairs", root / style / "run")
    return {style: root / style / "run" for style in STYLES}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square error relative to the root mean square of `expected`."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_stock_diffusers_reproduces_the_student(runs: dict[str, Path], tmp_path: Path) -> None:
    noise = noise_from_seeds([1, 2], (4, 16, 16))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    for style, run in runs.items():
        export(run, tmp_path / style)

    # Run the exports in a process without this package
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            STOCK,
            str(tmp_path / "noise.safetensors"),
            "|".join(PROMPTS),
            str(tmp_path / "found.safetensors"),
            *(str(tmp_path / style) for style in runs),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused:") == len(runs), done.stdout

    # Compare with the student in this process
    found = load_file(tmp_path / "found.safetensors")
    for index, run in enumerate(runs.values()):
        teacher, average, _ = load_student(run)
        student = Student(teacher)
        student.trained.load_state_dict(average)
        with torch.no_grad():
            expected = student(noise, teacher.encode(PROMPTS))
            initial = teacher.denoise(noise, teacher.last_timestep, teacher.encode(PROMPTS))
        assert relative_error(found[f"latents{index}"], expected) < 1e-5
        assert relative_error(initial, expected) > 1e-3  # training had an effect
        images = (teacher.decode(expected) + 1) / 2
        torch.testing.assert_close(found[f"images{index}"], images, rtol=0, atol=1e-3)


def test_folder_describes_its_run(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "export"
    export(runs["tiny_teacher"], out)

    description = json.loads((out / "diffusion2gan.json").read_text())
    assert description["pairs_seen"] == 6
    assert description["recipe"]["loss"] == "mse"
    assert description["pairs"]["count"] == 4
    card = (out / "README.md").read_text()
    assert "num_inference_steps=1, guidance_scale=0" in card
    assert "deterministic solver `ddim`" in card

    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert index["requires_safety_checker"] is False

    # No pickles, and no temporary files
    assert not list(out.rglob("*.bin"))
    assert [path.name for path in out.parent.iterdir()] == ["export"]


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_flipped_bit_in_an_export_is_refused(
    name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "export"
    export(runs["tiny_teacher"], out)
    written = json.loads((out / "diffusion2gan.json").read_text())["sha256"]
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written.keys() == names - {"README.md", "diffusion2gan.json", "model_index.json"}
    load_system(str(out))

    # One bit near the end of the file: the last weight, or a digit of the JSON
    content = bytearray((out / name).read_bytes())
    position = len(content) - 2
    while name.endswith(".json") and not chr(content[position]).isdigit():
        position -= 1
    content[position] ^= 1
    (out / name).write_bytes(content)

    # Every command refuses it
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    commands = [
        ["generate", out, "--prompt", "a red ring", "--out", tmp_path / "x.png"],
        ["evaluate", out, "--out", tmp_path / "metrics.json"],
        [
            "compare",
            "--system",
            f"a={out}",
            "--prompts",
            tmp_path / "prompts.txt",
            "--out",
            tmp_path / "compare",
        ],
        ["serve", out, "--port", 0],
    ]
    for command in commands:
        runner.assert_refused(
            runner.run(*command), 1, f"{out / name} is damaged", "sha256", written[name][:16]
        )
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "metrics.json").exists()

    # A changed file may be used on purpose
    monkeypatch.setenv("DIFFUSION2GAN_VERIFY", "0")
    load_system(str(out))


def test_files_of_runs_and_exports_follow_the_umask(runs: dict[str, Path], tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        export(runs["tiny_teacher"], tmp_path / "export")
        checkpoint.save(tmp_path / "run" / "checkpoint.safetensors", {"a": torch.ones(2)}, {})
    finally:
        os.umask(previous)
    for path in tmp_path.rglob("*"):
        expected = 0o750 if path.is_dir() else 0o640
        assert path.stat().st_mode & 0o777 == expected, path


def test_configs_do_not_contain_the_teachers_path(runs: dict[str, Path], tmp_path: Path) -> None:
    for style, run in runs.items():
        export(run, tmp_path / style)
        teacher = str(load_student(run)[2]["recipe"]["teacher"])
        for path in (tmp_path / style).rglob("*.json"):
            if path.name != "diffusion2gan.json":  # it contains the recipe as the user wrote it
                text = path.read_text()
                assert teacher not in text and "_name_or_path" not in text, path


def test_export_replaces_an_earlier_export_and_nothing_else(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "export"
    export(runs["tiny_teacher"], out)
    first = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")

    # A second export removes files of the first one
    (out / "stale").write_text("")
    export(runs["tiny_teacher"], out)
    second = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (out / "stale").exists()

    # float16
    export(runs["tiny_teacher"], out, torch.float16)
    half = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(half[key], first[key].half()) for key in first)

    # The export of another run stays, unless it is to be replaced
    other = next(run for name, run in runs.items() if name != "tiny_teacher")
    with pytest.raises(UserError, match=r"the export of another run .*--overwrite"):
        export(other, out)
    kept = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[key], half[key]) for key in half)
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"frechet_distance_to_teacher": 0.25, "features": "probe"}')
    export(other, out, overwrite=True, metrics=metrics)
    card = (out / "README.md").read_text().replace("\\_", "_")
    assert "frechet_distance_to_teacher 0.25" in card
    assert json.loads((out / "diffusion2gan.json").read_text())["recipe"]["teacher"] != str(
        load_student(runs["tiny_teacher"])[2]["recipe"]["teacher"]
    )

    # Other folders and files stay
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for existing in (mine, mine / "thesis.txt"):
        with pytest.raises(UserError, match="is not an export, so it is not replaced"):
            export(runs["tiny_teacher"], existing)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_second_export_at_the_same_time_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "one_step"
    with exclusive_lock(out), pytest.raises(UserError, match="is being written by another process"):
        export(runs["tiny_teacher"], out)
    assert not out.exists()
    export(runs["tiny_teacher"], out)  # the lock is released


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_teacher_in_memory_is_not_modified(
    runs: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    teacher, student, _ = load_student(runs["tiny_teacher"])
    modules = {name: getattr(teacher.pipeline, name) for name in ("unet", "vae", "text_encoder")}
    before = {}
    for name, module in modules.items():
        before[name] = {key: value.clone() for key, value in module.state_dict().items()}
    scheduler = teacher.pipeline.scheduler
    assert any(not torch.equal(before["unet"][key], value) for key, value in student.items())

    write_pipeline(teacher, student, tmp_path / "out", dtype)
    for name, module in modules.items():
        assert getattr(teacher.pipeline, name) is module
        for key, value in module.state_dict().items():
            assert torch.equal(before[name][key], value), (name, key)
    assert teacher.pipeline.scheduler is scheduler


def test_missing_run_and_missing_checkpoint_are_reported(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"contains no run \(recipe\.json is missing\)"):
        export(tmp_path, tmp_path / "out")

    new_run = tmp_path / "new_run"
    new_run.mkdir()
    (new_run / "recipe.json").write_bytes((runs["tiny_teacher"] / "recipe.json").read_bytes())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export(new_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_card_shows_odd_names_as_they_are(runs: dict[str, Path], tmp_path: Path) -> None:
    teacher, _, description = load_student(runs["tiny_teacher"])
    description["pairs"]["teacher"] = "a`b``\n---\nlicense: mit\n# [x](http://example.com) <b>"
    description["metrics"] = {"a|b\n# heading": 1.0}
    source = tmp_path / "teacher"
    source.mkdir()
    (source / "README.md").write_bytes(b"---\nlicense: [&x\n---\n\xff")
    teacher.folder = source
    export(runs["tiny_teacher"], tmp_path / "export")
    card = model_card(description, teacher, Contents())

    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "[&x"
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert [line.split()[1] for line in headings] == [
        "One-step",
        "Usage",
        "Training",
        "Evaluation",
        "License",
    ]
    assert (
        r"# One-step student of a\`b\`\` --- license: mit \# \[x\](http://example.com) &lt;b&gt;"
        in body
    )
    assert "- Teacher: ``` a`b`` --- license: mit # [x](http://example.com) <b> ```, " in body
    assert r"a&#124;b \# heading 1" in body
