"""The folder that the multi-rank tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_pocket
import torch
from distill.rank_processes import BATCH

from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.loading import load_teacher


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `pairs`, `vgg` (all tiny), and `recipe.json`, which uses them: the full method."""
    folder = tmp_path_factory.mktemp("ranks")

    # Teacher and perceptual network, with random weights
    tiny_pocket.save(folder / "teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vgg = VGG(4, (8, 8, 8, 8, 8), 2)
        heads = [torch.rand(8) for _ in range(5)]
    LatentLPIPS(vgg, heads).save_pretrained(folder / "vgg")

    # Pairs
    teacher = load_teacher(str(folder / "teacher"))
    spec = PairsSpec(
        teacher.name, teacher.revision, "words", 24, 0, 2, 1.0, teacher.latent_shape, 8
    )
    make_pairs(
        teacher, lambda indices: [f"a star {i % 5}" for i in indices], spec, folder / "pairs"
    )

    recipe = Recipe(
        teacher=str(folder / "teacher"),
        perceptual=str(folder / "vgg"),
        total_pairs=20 * BATCH,
        batch_size=BATCH,
        adversarial_weight=0.5,
        discriminator_warmup=0,
        r1_every=2,
        r1_weight=1e-3,
        mix_share=0.4,
        warmup=0.0,
        learning_rate=1e-4,
        checkpoint_every_s=1e-9,
        sample_every=10**6,
    )
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump()))
    return folder
