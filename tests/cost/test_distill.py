"""The numbers of a dry run are those of the real run: counted by hand, and measured on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion2gan.cost.distill import dry_run
from diffusion2gan.cost.pairs import estimate_pairs_cost
from diffusion2gan.distill import train
from diffusion2gan.distill.run import CHECKPOINT
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
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
