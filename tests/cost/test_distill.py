"""The numbers of a dry run are those of the real run: counted by hand, and measured on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.runner import run

from diffusion2gan.adversarial.losses import (
    exact_derivatives,
    finite_difference_r1,
    r1_penalty,
)
from diffusion2gan.cost import distill as distill_cost
from diffusion2gan.cost import limits
from diffusion2gan.cost.distill import dry_run
from diffusion2gan.cost.pairs import estimate_pairs_cost
from diffusion2gan.distill import checkpoints, train
from diffusion2gan.distill.memory import AllocationCounter, count_r1_bytes
from diffusion2gan.distill.run import CHECKPOINT, Run
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe, load_recipe, shipped_recipes
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.prompt_cache import PromptCache

PROMPTS = ["a star", "two stars", "a red ring", "a star"]
MIB = 2**20


@pytest.fixture
def sdxl(family_folder: Callable[[str], Path]) -> Path:
    return family_folder("sdxl")


def make_spec(teacher: Teacher, count: int = 4) -> PairsSpec:
    return PairsSpec(
        teacher.name, teacher.revision, "words", count, 0, 2, 3.0, teacher.latent_shape, 4
    )


@pytest.fixture
def pairs(sdxl: Path, tmp_path: Path) -> Path:
    teacher = load_teacher(str(sdxl))
    folder = tmp_path / "pairs"
    make_pairs(teacher, lambda indices: [PROMPTS[i] for i in indices], make_spec(teacher), folder)
    return folder


def test_dry_run_of_distill_matches_the_real_run(sdxl: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        teacher=str(sdxl), loss="mse", total_pairs=8, batch_size=2, adversarial_weight=0.1
    )
    cost = dry_run(recipe, pairs, 2.0)
    assert not (tmp_path / "run").exists()

    # Counted: float32 weights; gradient, Adam's two averages and the EMA
    network = load_teacher(str(sdxl)).network
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert cost["student_parameters"] == num_parameters
    assert cost["student_weights_mib"] == pytest.approx(num_parameters * 4 / MIB, abs=0.06)
    assert cost["student_gradients_adam_average_mib"] == pytest.approx(
        num_parameters * 16 / MIB, abs=0.06
    )
    assert cost["steps"] == 4
    assert cost["money"] == pytest.approx(2 * float(cost["hours"]), abs=0.02)

    # Measured: a checkpoint, and the one before it
    train.distill(recipe, pairs, tmp_path / "run")
    size = (tmp_path / "run" / CHECKPOINT).stat().st_size / MIB
    assert float(cost["checkpoint_disk_mib"]) == pytest.approx(2 * size, rel=0.15)


@pytest.mark.parametrize("method", ["exact", "finite_differences"])
def test_memory_of_r1_is_counted_without_computing(sdxl: Path, method: str) -> None:
    """The count is that of the real computation; the exact penalty needs more."""
    teacher = load_teacher(str(sdxl))
    run = Run(Recipe(teacher=str(sdxl), loss="mse", batch_size=2), teacher)
    assert run.discriminator is not None
    for parameter in run.discriminator.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(1, *teacher.latent_shape)
    cond = teacher.unconditional()
    with AllocationCounter() as counter:
        if method == "exact":
            with exact_derivatives("cpu"):
                r1_penalty(run.discriminator, x, cond, x).backward()
        else:
            finite_difference_r1(run.discriminator, x, cond, x, x).backward()
    counted = count_r1_bytes(run, method)
    assert counted == pytest.approx(counter.peak, rel=0.1)
    if method == "exact":
        assert counted > 1.5 * count_r1_bytes(run, "finite_differences")


def test_allocation_counter_knows_what_is_alive() -> None:
    with AllocationCounter() as counter:
        a = torch.zeros(1000)
        b = a + 1  # 8 000 bytes alive
        del a
        c = b.view(10, 100)  # no memory
        for _ in range(5):
            d = c * 2  # 8 000 again, or 12 000 while the last one is replaced
    assert d.shape == c.shape
    assert counter.peak == 12_000


def test_out_of_memory_names_the_counted_need_and_what_helps(
    sdxl: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = train.step
    num_steps = 0

    def step(*args: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real_step(*args)

    monkeypatch.setattr(train, "step", step)
    recipe = Recipe(
        teacher=str(sdxl),
        loss="mse",
        total_pairs=8,
        batch_size=2,
        adversarial_weight=0.1,
        checkpoint_every_s=1e-9,
    )
    with pytest.raises(Failure) as failure:
        train.distill(recipe, pairs, tmp_path)
    message = str(failure.value)
    assert message.startswith("out of memory after 4 pairs, on cpu (CUDA out of memory. Tried")
    for words in (
        "gradient_accumulation_steps=2 or less (it is 1, with micro-batches of 2)",
        "gradient_checkpointing=true",
        "r1_method=finite_differences",
        "prompt_embeds=kept",
        "GiB for the R1 penalty on one sample (counted)",
    ):
        assert words in message
    assert checkpoints.read_meta(tmp_path / CHECKPOINT)["pairs_seen"] == 4


def test_kept_embeddings_are_those_of_the_text_encoders_which_are_removed(
    sdxl: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(sdxl))
    expected = teacher.encode(PROMPTS)
    calls: list[list[str]] = []

    def encode(prompts: list[str]) -> Any:
        calls.append(prompts)
        return teacher.encode(prompts)

    # Every prompt is encoded once, and not again by a second cache
    cache = PromptCache(tmp_path / "prompts", PROMPTS, encode)
    assert calls == [PROMPTS[:3]]
    second_cache = PromptCache(tmp_path / "prompts", PROMPTS, encode)
    assert len(calls) == 1

    teacher.cache_prompts(second_cache)
    assert teacher.pipeline.text_encoder is None
    assert teacher.pipeline.text_encoder_2 is None
    found = teacher.encode(PROMPTS)
    for name, value in found.tensors().items():
        torch.testing.assert_close(value, expected.tensors()[name], rtol=2e-3, atol=1e-3)
    assert found.time_ids is not None and expected.time_ids is not None
    assert torch.equal(found.time_ids, expected.time_ids)

    with pytest.raises(UserError, match=r"'a new prompt'; set prompt_embeds=encoded"):
        cache.read(["a new prompt"])


def test_run_with_kept_embeddings_has_nearly_the_losses_of_encoded_ones(
    sdxl: Path, pairs: Path, tmp_path: Path
) -> None:
    def read_losses(out: Path) -> list[float]:
        lines = (out / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    settings: dict[str, Any] = {
        "teacher": str(sdxl),
        "loss": "mse",
        "total_pairs": 4,
        "batch_size": 2,
        "adversarial_weight": 0,
    }
    kept = Recipe(prompt_embeds="kept", **settings)
    train.distill(Recipe(prompt_embeds="encoded", **settings), pairs, tmp_path / "encoded")
    train.distill(kept, pairs, tmp_path / "kept")
    expected = read_losses(tmp_path / "encoded")
    assert read_losses(tmp_path / "kept") == pytest.approx(expected, rel=1e-2)

    # The VAE, which was offloaded, decodes the samples
    assert (tmp_path / "kept" / "samples" / "000000004.png").exists()

    cost = dry_run(kept, pairs)
    assert cost["text_encoders_mib"] == 0
    assert float(cost["prompts_disk_mib"]) > 0


def test_dry_run_of_pairs_matches_their_files(sdxl: Path, pairs: Path) -> None:
    teacher = load_teacher(str(sdxl))
    cost = estimate_pairs_cost(teacher, make_spec(teacher, 1000), PROMPTS, 3.0)

    latents_bytes = 4 * 8 * 8 * 2  # float16
    bytes_per_pair = sum(path.stat().st_size for path in pairs.glob("*.parquet")) / 4
    assert bytes_per_pair > latents_bytes
    assert cost["disk_mib"] == pytest.approx(1000 * (latents_bytes + 60) / MIB, abs=0.06)

    num_parameters = sum(parameter.numel() for parameter in teacher.network.parameters())
    assert cost["network_parameters"] == num_parameters
    assert cost["hours"] == pytest.approx(1000 / float(cost["pairs_per_second"]) / 3600, abs=0.01)


# Without the weights, the memory or the time to measure


@pytest.fixture
def configs(tmp_path: Path) -> Callable[[Path], Path]:
    """A pipeline folder → a copy of it without weights."""

    def copy(folder: Path) -> Path:
        without = shutil.ignore_patterns("*.safetensors")
        return Path(shutil.copytree(folder, tmp_path / f"{folder.name}-configs", ignore=without))

    return copy


FAMILY_OF = {"sd15": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux_dev"}
COUNTED_RECIPES = [
    pytest.param(name, marks=[] if name == "sdxl" else [pytest.mark.slow])
    for name in shipped_recipes()
    if "pocket" not in name
]


@pytest.mark.parametrize("name", COUNTED_RECIPES)
def test_dry_run_of_every_recipe_counts_from_configs_alone(
    name: str, family_folder: Callable[[str], Path], configs: Any, tmp_path: Path
) -> None:
    if load_recipe(name).lora_rank > 0:
        pytest.importorskip("peft")
    complete = family_folder(FAMILY_OF[name.partition("-")[0]])
    settings = ["adversarial_weight=0.1"]
    counted = dry_run(
        load_recipe(name, [f"teacher={configs(complete)}", *settings]), tmp_path / "no pairs"
    )
    assert "has no weights of its" in str(counted["not_measured"])
    assert "hours" not in counted

    # The same numbers as with the weights
    teacher = load_teacher(str(complete))
    recipe = load_recipe(name, [f"teacher={complete}", "perceptual=decoder", "precision=float32"])
    recipe = recipe.model_copy(update={"adversarial_weight": 0.1})
    loaded = distill_cost.count_cost(distill_cost.Run(recipe, teacher), None, is_cpu=True)
    assert counted == loaded | {"not_measured": counted["not_measured"]}
    assert float(counted["student_parameters"]) > 0 < float(counted["discriminator_parameters"])


def test_dry_run_of_pairs_counts_from_configs_alone(
    sdxl: Path, configs: Any, tmp_path: Path
) -> None:
    options = ("--prompts", "starter", "--count", 1000, "--dry-run", "--out", tmp_path / "pairs")
    counted = run("pairs", "--teacher", configs(sdxl), *options)
    assert counted.code == 0 and "has no weights of its" in counted.out, counted
    measured = run("pairs", "--teacher", sdxl, "--num-inference-steps", 2, *options)
    assert measured.code == 0 and "hours: " in measured.out, measured
    assert counted.out.splitlines()[:-1] == measured.out.splitlines()[:3]
    assert not (tmp_path / "pairs").exists()


def test_dry_run_on_a_machine_without_the_memory_or_the_pairs_counts(
    sdxl: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(teacher=str(sdxl), loss="mse", total_pairs=8, batch_size=2)
    assert "contains no pairs yet" in str(dry_run(recipe, tmp_path / "no")["not_measured"])

    monkeypatch.setattr(limits, "available_bytes", lambda device: 2**20)
    cost = dry_run(recipe, pairs)
    assert "GiB without activations, and cpu has 0.0 GiB free" in str(cost["not_measured"])
    assert float(cost["memory_without_activations_mib"]) > 1


def test_long_steps_on_a_cpu_are_extrapolated(
    sdxl: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        teacher=str(sdxl), loss="mse", total_pairs=80, batch_size=8, adversarial_weight=0
    )
    measured = dry_run(recipe, pairs)
    assert "extrapolated" not in measured
    monkeypatch.setattr(distill_cost, "LONG_STEP_S", 0.0)
    cost = dry_run(recipe, pairs)
    assert cost["extrapolated"] == "time, from steps of 2 pairs"
    # Four times a step of two pairs: a small step costs more per pair
    assert float(cost["seconds_per_step"]) > 0.5 * float(measured["seconds_per_step"])
