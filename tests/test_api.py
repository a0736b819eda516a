"""The Python API: from a pipeline object to a student, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig
from PIL import Image

from diffusion2gan import Recipe, compare, distill, evaluate, export, load_teacher, make_pairs
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.store import open_set, read_shard
from diffusion2gan.runtime.files import sha256

PROMPTS = ["a red star on sand", "a plain cyan moon on grey"]
SETTINGS = {"total_pairs": 8, "batch_size": 4, "loss": "mse", "adversarial_weight": 0}


NOTEBOOK = Path(__file__).parents[1] / "examples" / "distill.ipynb"


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    folder = tiny_pocket.save(tmp_path / "saved" / "tiny")
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def test_from_a_pipeline_object_to_a_student(pipe: Any) -> None:
    # The ten lines of the documentation
    pairs = make_pairs(pipe, PROMPTS, "pairs", count=8, num_inference_steps=2)
    run = distill("pocket-regression", pairs, "runs/mine", teacher=pipe, **SETTINGS)
    student = export(run, "export/mine")

    # One folder, found by the content of the pipeline; it is what the pairs and the run name
    (teacher,) = Path("teachers").iterdir()
    spec = open_set(Path("pairs"))
    assert teacher.name == f"StableDiffusionPipeline-{spec.revision}"
    assert sha256(teacher).startswith(spec.revision)
    described = json.loads((run / "recipe.json").read_text())
    assert described["recipe"]["teacher"] == str(teacher)
    assert described["recipe"]["total_pairs"] == 8

    # The same pairs as from the pipeline's folder
    make_pairs("saved/tiny", PROMPTS, "pairs-of-folder", count=8, num_inference_steps=2)
    found = read_shard(Path("pairs"), 0)
    expected = read_shard(Path("pairs-of-folder"), 0)
    assert torch.equal(found.latents, expected.latents)
    assert found.prompts == PROMPTS * 4

    # A second call resumes: nothing is left to do, and no file changes
    before = (run / "checkpoint.safetensors").stat().st_mtime_ns
    log = (run / "log.jsonl").read_text()
    distill("pocket-regression", pairs, "runs/mine", teacher=pipe, **SETTINGS)
    assert (run / "log.jsonl").read_text() == log
    assert before <= (run / "checkpoint.safetensors").stat().st_mtime_ns

    # Metrics and a page
    metrics = evaluate(student, "metrics.json", count=4, num_resamples=0)
    assert metrics == json.loads(Path("metrics.json").read_text())
    assert metrics["count"] == 4
    systems = {"teacher": f"{teacher}@2", "student": student}
    page = compare(systems, PROMPTS, "report", metrics={"student": metrics})
    assert page.read_text().count("data:image/png") == 4
    assert "Same-noise" in page.read_text()


def test_changed_weights_are_another_teacher(pipe: Any) -> None:
    first = load_teacher(pipe)
    assert load_teacher(pipe).revision == first.revision
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    second = load_teacher(pipe)
    assert second.revision != first.revision
    assert torch.equal(second.network.conv_in.weight, 2 * first.network.conv_in.weight)
    assert len(list(Path("teachers").iterdir())) == 2


def test_changed_scheduler_is_another_teacher(pipe: Any) -> None:
    first = load_teacher(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.013)
    assert load_teacher(pipe).revision != first.revision


def test_half_precision_pipeline_is_a_teacher(pipe: Any) -> None:
    teacher = load_teacher(pipe.to(torch.float16))
    assert teacher.network.dtype == torch.float32
    assert torch.equal(teacher.network.conv_in.weight, pipe.unet.conv_in.weight.float())


def test_pipeline_with_an_unmerged_lora_is_refused_and_nothing_is_written(pipe: Any) -> None:
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    with pytest.raises(
        UserError, match=r"unet has LoRAs that are not merged \(default\).*fuse_lora"
    ):
        load_teacher(pipe)
    assert not Path("teachers").exists()


def test_recipe_objects_and_paths_are_accepted(pipe: Any) -> None:
    make_pairs(Path("saved/tiny"), PROMPTS, Path("pairs"), count=4, num_inference_steps=2)
    recipe = Recipe(teacher="saved/tiny", **SETTINGS)
    run = distill(recipe, Path("pairs"), Path("run"), total_pairs=4)
    described = json.loads((run / "recipe.json").read_text())
    assert described["recipe"]["total_pairs"] == 4
    assert described["recipe"]["teacher"] == "saved/tiny"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_teacher(Image.new("RGB", (8, 8))), "a Image cannot be a teacher. Give `poc"),
        (lambda: make_pairs("pocket", [], "p"), "prompts: the list is empty"),
        (lambda: make_pairs("pocket", ["a", ""], "p"), "prompts: number 1 is ''"),
        (lambda: make_pairs("pocket", "none.txt", "p"), "no prompts file none.txt"),
        (lambda: make_pairs("none", ["a"], "p"), "none is not a diffusers pipeline"),
        (lambda: distill("pokcet", "p", "r"), "no recipe 'pokcet'.*did you mean 'pocket'"),
        (lambda: distill("pocket", "p", "r", total_pair=1), "did you mean 'total_pairs'"),
        (lambda: distill("pocket", "p", "r", total_pairs=0), "distill: total_pairs = 0"),
        (lambda: distill("pocket", "p", "s3://b/r"), "out s3://b/r is a URL"),
        (lambda: export("none", "e"), "none contains no run"),
        (lambda: evaluate("pocket-student", cuont=4), "no option 'cuont'; did you mean 'count'"),
        (
            lambda: compare({"a": "pocket-student"}, ["x"], "c", metrics={"b": {}}),
            "metrics: there is no system 'b'",
        ),
    ],
)
def test_wrong_arguments_are_reported_and_nothing_is_written(
    call: Callable[[], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells), "outputs are not committed"

    # The cells' source in one namespace, as a kernel runs them; no kernel is installed for it
    namespace: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), namespace)
    assert namespace["metrics"]["count"] == 16
    assert (tmp_path / "report" / "index.html").is_file()
    assert namespace["pipeline"].scheduler.config.original_inference_steps == 1
