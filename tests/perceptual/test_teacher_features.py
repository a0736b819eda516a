"""The fallback distance on the teacher's own features, for every family; fitted networks for 16 and 32 channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import ONE_EACH, RESOLUTION, SIZE

from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.perceptual.distance import ELatentLPIPS
from diffusion2gan.perceptual.fit import FitSettings, fit
from diffusion2gan.perceptual.teacher_features import ensembled_distance, plain_distance
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

Folder = Callable[[str], Path]


@pytest.fixture(params=ONE_EACH)
def teacher(request: pytest.FixtureRequest, family_folder: Folder) -> Teacher:
    return load_teacher(str(family_folder(request.param)), resolution=RESOLUTION[request.param])


def latents(teacher: Teacher, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, count, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    return a, b


def by_hand(teacher: Teacher, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The formula in float64, on what the whole uncut network says of clean latents at timestep 0."""
    network, maps = teacher.network, []
    if teacher.family.network == "unet":
        read = [
            block.resnets[-1] if not hasattr(block, "attentions") else block.attentions[-1]
            for block in network.down_blocks
        ]
        read.append(network.mid_block)
    else:  # two blocks, or Flux's three: after a quarter (at least one), half, three quarters
        both = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]
        read = {2: both[:1], 3: both[:2]}[len(both)]
    for x in (a, b):
        found: list[Any] = []
        handles = [
            block.register_forward_hook(lambda m, i, o, found=found: found.append(o))
            for block in read
        ]
        cond = Conditioning.concat(*[teacher.unconditional()] * len(x))
        teacher.family.output(network, x, 0, cond)
        for handle in handles:
            handle.remove()
        told = [
            o[-1]
            if isinstance(o, tuple) and o[-1].ndim == 3
            else o[0]
            if isinstance(o, tuple)
            else o
            for o in found
        ]
        maps.append([(o if o.ndim == 4 else o.mT[..., None]).double() for o in told])
    layers = []
    for one, other in zip(*maps, strict=True):
        one, other = (m / (m.square().sum(1, keepdim=True) + 1e-8).sqrt() for m in (one, other))
        layers.append((one - other).square().sum(1).mean((1, 2)))
    return torch.stack(layers).mean(0)


def test_it_is_its_formula_on_the_whole_network(teacher: Teacher) -> None:
    a, b = latents(teacher)
    distance = plain_distance(teacher)(a, b)
    with torch.no_grad():
        torch.testing.assert_close(distance.double(), by_hand(teacher, a, b), rtol=1e-4, atol=1e-7)
    assert distance.shape == (3,) and (distance > 1e-4).all() and (distance <= 4).all()


def test_it_is_a_distance_and_leaves_the_teacher_alone(teacher: Teacher) -> None:
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    a, b = latents(teacher)
    for distance in (plain_distance(teacher), ensembled_distance(teacher, "geometric+cutout", 1)):
        assert list(distance.parameters()) == []  # nothing that an optimiser could find
        torch.testing.assert_close(distance(a, a), torch.zeros(3))
        x = a.clone().requires_grad_()
        distance(x, b).sum().backward()
        assert (
            x.grad is not None
            and x.grad.isfinite().all()
            and (x.grad.abs().amax((1, 2, 3)) > 0).all()
        )
    plain = plain_distance(teacher)
    alone = torch.cat([plain(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, plain(a, b), rtol=1e-4, atol=1e-6)  # each row by itself
    torch.testing.assert_close(plain(b, a), plain(a, b), rtol=1e-4, atol=1e-6)
    near, far = plain(b + 0.01 * (a - b), b), plain(b + 0.3 * (a - b), b)
    assert (near < far).all()
    assert teacher.network.state_dict().keys() == before.keys()
    assert all(
        torch.equal(before[key], value) for key, value in teacher.network.state_dict().items()
    )
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())


def test_the_same_transform_meets_both_sides(teacher: Teacher) -> None:
    a, b = latents(teacher)
    distance = ensembled_distance(teacher, "geometric+cutout", 1)
    fixed = [distance(a, b, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(fixed[0], fixed[2])
    torch.testing.assert_close(distance(a, a, torch.Generator().manual_seed(0)), torch.zeros(3))


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}])
def test_a_run_with_it(settings: dict[str, Any], family_folder: Folder, tmp_path: Path) -> None:
    if settings:
        pytest.importorskip("peft")
    teacher = load_teacher(str(family_folder("sana")), resolution=RESOLUTION["sana"])
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 2, 3.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, tmp_path / "pairs")
    recipe = Recipe(
        teacher=str(family_folder("sana")),
        resolution=RESOLUTION["sana"],
        perceptual="teacher",
        total_pairs=6,
        batch_size=2,
        prompt_embeds="kept",
        adversarial_weight=0,
        **settings,
    )
    assert recipe.needs_teacher
    distill(recipe, tmp_path / "pairs", tmp_path / "run")
    assert '"skipped": 0' in (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]


def pictures(folder: Path, size: int) -> Path:
    noise = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 220)), ("red", (220, 50, 40))):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            made = np.clip(np.array(colour) + noise.normal(0, 25, (size, size, 3)), 0, 255).astype(
                np.uint8
            )
            Image.fromarray(made).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("name", "channels", "dropped"),
    [("sd15", 4, 3), ("sdxl", 4, 3), ("sd3", 16, 3), ("flux_dev", 16, 3), ("sana", 32, 4)],
)
def test_a_network_for_every_vae(
    name: str, channels: int, dropped: int, family_folder: Folder, tmp_path: Path
) -> None:
    teacher, size = (
        load_teacher(str(family_folder(name)), resolution=RESOLUTION[name]),
        RESOLUTION[name],
    )
    fit(
        pictures(tmp_path / "set", size),
        tmp_path / "network",
        str(family_folder(name)),
        FitSettings(widths=(4, 4, 4, 4, 4), size=size, epochs=1, batch_size=4),
    )
    fitted = ELatentLPIPS.from_pretrained(tmp_path / "network")
    assert fitted.channels == channels and fitted._frozen[0].num_dropped == dropped
    a, b = latents(teacher)
    assert a.shape[1:] == (channels, SIZE, SIZE)
    recipe = Recipe(teacher=str(family_folder(name)), perceptual=str(tmp_path / "network"))
    distance = build_distance(recipe, torch.device("cpu"), teacher)
    generator = torch.Generator().manual_seed(0)
    assert (distance(a, b, generator) > 0).all() and float(
        distance(a, a, generator).abs().max()
    ) < 1e-6


def test_where_no_network_fits_both_ways_out_are_named(
    family_folder: Folder, tmp_path: Path
) -> None:
    teacher = load_teacher(str(family_folder("flux_dev")), resolution=64)
    for perceptual, told in (
        ("pocket", "reads 4 channels; flux_dev's latents have 16"),
        ("nowhere", "'nowhere' is not a perceptual network"),
    ):
        with pytest.raises(UserError, match=told) as error:
            build_distance(Recipe(perceptual=perceptual), torch.device("cpu"), teacher)
        assert "perceptual fit --images" in str(error.value) and "perceptual=teacher" in str(
            error.value
        )
    with pytest.raises(ValueError, match="for pixel_lpips name a pixel network"):
        Recipe(perceptual="teacher", loss="pixel_lpips")


def test_the_pockets_network_for_another_vae_is_warned_of(
    family_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    build_distance(Recipe(), torch.device("cpu"), load_teacher(str(family_folder("sd15"))))
    assert "fitted to another VAE than sd15's" in capsys.readouterr().err
    build_distance(Recipe(), torch.device("cpu"), load_teacher("pocket"))
    assert "warning" not in capsys.readouterr().err
