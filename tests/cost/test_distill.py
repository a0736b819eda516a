"""What a dry run says is what is there: counted again by hand, and on disk."""

from __future__ import annotations

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
from diffusion2gan.teacher.prompt_cache import PromptCache

PROMPTS = ["a star", "two stars", "a red ring", "a star"]
MIB = 2**20


@pytest.fixture
def sdxl(family_folder: Callable[[str], Path]) -> Path:
    return family_folder("sdxl")


def spec_of(teacher: Any, count: int = 4) -> PairsSpec:
    return PairsSpec(
        teacher.name, teacher.revision, "words", count, 0, 2, 3.0, teacher.latent_shape, 4
    )


@pytest.fixture
def pairs(sdxl: Path, tmp_path: Path) -> Path:
    teacher = load_teacher(str(sdxl))
    make_pairs(
        teacher, lambda indices: [PROMPTS[i] for i in indices], spec_of(teacher), tmp_path / "pairs"
    )
    return tmp_path / "pairs"


def test_a_dry_run_counts_what_is_there(sdxl: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        teacher=str(sdxl), loss="mse", total_pairs=8, batch_size=2, adversarial_weight=0.1
    )
    told = dry_run(recipe, pairs, 2.0)
    numbers = sum(p.numel() for p in load_teacher(str(sdxl)).network.parameters())
    assert told["student_parameters"] == numbers and told["steps"] == 4
    assert told["student_weights_mib"] == pytest.approx(numbers * 4 / MIB, abs=0.06)
    assert told["student_gradients_adam_average_mib"] == pytest.approx(numbers * 16 / MIB, abs=0.06)
    assert told["money"] == pytest.approx(2 * float(told["hours"]), abs=0.02)
    assert not (tmp_path / "run").exists()
    train.distill(recipe, pairs, tmp_path / "run")
    size = (tmp_path / "run" / CHECKPOINT).stat().st_size / MIB
    assert float(told["checkpoint_disk_mib"]) == pytest.approx(2 * size, rel=0.15)


def test_kept_prompts_are_the_encoded_ones_and_need_no_encoder(
    sdxl: Path, pairs: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(sdxl))
    expected = teacher.encode(PROMPTS)
    calls: list[list[str]] = []

    def encode(prompts: list[str]) -> Any:
        calls.append(prompts)
        return teacher.encode(prompts)

    store = PromptCache(tmp_path / "prompts", PROMPTS, encode)
    assert calls == [PROMPTS[:3]]  # each once
    again = PromptCache(tmp_path / "prompts", PROMPTS, encode)
    assert len(calls) == 1  # nothing anew
    teacher.cache_prompts(again)
    assert teacher.pipeline.text_encoder is None and teacher.pipeline.text_encoder_2 is None
    for name, value in teacher.encode(PROMPTS).tensors().items():
        torch.testing.assert_close(value, expected.tensors()[name], rtol=2e-3, atol=1e-3)
    assert torch.equal(teacher.encode(PROMPTS).time_ids, expected.time_ids)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"'nobody asked'; set prompt_embeds=encoded"):
        store.read(["nobody asked"])


def test_a_run_on_kept_prompts_is_nearly_the_other(sdxl: Path, pairs: Path, tmp_path: Path) -> None:
    import json

    losses = {}
    for kind in ("encoded", "kept"):
        options: dict[str, Any] = {
            "loss": "mse",
            "total_pairs": 4,
            "batch_size": 2,
            "adversarial_weight": 0,
        }
        recipe = Recipe(teacher=str(sdxl), prompt_embeds=kind, **options)
        train.distill(recipe, pairs, tmp_path / kind)
        lines = (tmp_path / kind / "log.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines]
    assert losses["kept"] == pytest.approx(losses["encoded"], rel=1e-2)
    assert (tmp_path / "kept" / "samples" / "000000004.png").exists()  # the VAE came back for it
    told = dry_run(recipe, pairs)
    assert told["text_encoders_mib"] == 0 and float(told["prompts_disk_mib"]) > 0


def test_a_set_costs_what_its_file_takes(sdxl: Path, pairs: Path) -> None:
    teacher = load_teacher(str(sdxl))
    told = estimate_pairs_cost(teacher, spec_of(teacher, 1000), PROMPTS, 3.0)
    per_pair = sum(path.stat().st_size for path in pairs.glob("*.parquet")) / 4
    latents = 4 * 8 * 8 * 2
    assert (
        told["disk_mib"] == pytest.approx(1000 * (latents + 60) / MIB, abs=0.06)
        and per_pair > latents
    )
    assert told["network_parameters"] == sum(p.numel() for p in teacher.network.parameters())
    assert told["hours"] == pytest.approx(1000 / float(told["pairs_per_second"]) / 3600, abs=0.01)
