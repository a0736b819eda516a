"""The distance on the teacher's features, and fitted networks, for every family of teachers."""

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


def reference_distance(teacher: Teacher, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The formula in float64, on the features of the complete network."""
    layers = []
    for map_a, map_b in zip(
        reference_features(teacher, a), reference_features(teacher, b), strict=True
    ):
        normalized_a = map_a / (map_a.square().sum(1, keepdim=True) + 1e-8).sqrt()
        normalized_b = map_b / (map_b.square().sum(1, keepdim=True) + 1e-8).sqrt()
        layers.append((normalized_a - normalized_b).square().sum(1).mean((1, 2)))
    return torch.stack(layers).mean(0)


def reference_features(teacher: Teacher, x: torch.Tensor) -> list[torch.Tensor]:
    """The feature maps of clean latents at timestep 0, float64, from the complete network."""
    # The blocks to read
    network = teacher.network
    blocks = []
    if teacher.family.network == "unet":
        for block in network.down_blocks:
            has_attention = hasattr(block, "attentions")
            blocks.append(block.attentions[-1] if has_attention else block.resnets[-1])
        blocks.append(network.mid_block)
    else:
        # The tiny networks have two blocks, Flux three: those after a quarter (at least one block),
        # half and three quarters of them
        all_blocks = [*network.transformer_blocks]
        all_blocks += getattr(network, "single_transformer_blocks", [])
        blocks = {2: all_blocks[:1], 3: all_blocks[:2]}[len(all_blocks)]

    # Run the network
    outputs: list[Any] = []
    handles = []
    for block in blocks:
        handles.append(block.register_forward_hook(lambda m, i, output: outputs.append(output)))
    cond = Conditioning.concat(*[teacher.unconditional()] * len(x))
    teacher.family.output(network, x, 0, cond)
    for handle in handles:
        handle.remove()

    # Tokens [B, tokens, D] to maps [B, D, tokens, 1]
    maps = []
    for output in outputs:
        if isinstance(output, tuple):
            output = output[-1] if output[-1].ndim == 3 else output[0]
        maps.append((output if output.ndim == 4 else output.mT[..., None]).double())
    return maps


def test_plain_distance_is_its_formula_on_the_complete_network(teacher: Teacher) -> None:
    a, b = latents(teacher)
    distance = plain_distance(teacher)(a, b)
    with torch.no_grad():
        expected = reference_distance(teacher, a, b)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=1e-7)
    assert distance.shape == (3,) and (distance > 1e-4).all() and (distance <= 4).all()


def test_distances_have_their_properties_and_do_not_change_the_teacher(teacher: Teacher) -> None:
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    a, b = latents(teacher)
    for distance in (plain_distance(teacher), ensembled_distance(teacher, {})):
        assert list(distance.parameters()) == []  # nothing to optimise
        torch.testing.assert_close(distance(a, a), torch.zeros(3))
        x = a.clone().requires_grad_()
        distance(x, b).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        assert (x.grad.abs().amax((1, 2, 3)) > 0).all()

    # Rows are independent, the distance is symmetric and grows with the difference
    plain = plain_distance(teacher)
    alone = torch.cat([plain(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, plain(a, b), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain(b, a), plain(a, b), rtol=1e-4, atol=1e-6)
    near, far = plain(b + 0.01 * (a - b), b), plain(b + 0.3 * (a - b), b)
    assert (near < far).all()

    # The teacher's weights are unchanged
    assert teacher.network.state_dict().keys() == before.keys()
    assert all(
        torch.equal(before[key], value) for key, value in teacher.network.state_dict().items()
    )
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())


def test_both_sides_get_the_same_transform(teacher: Teacher) -> None:
    a, b = latents(teacher)
    distance = ensembled_distance(teacher, {})
    fixed = [distance(a, b, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(fixed[0], fixed[2])
    torch.testing.assert_close(distance(a, a, torch.Generator().manual_seed(0)), torch.zeros(3))


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}])
def test_a_student_is_trained_with_the_teachers_features(
    settings: dict[str, Any], family_folder: Folder, tmp_path: Path
) -> None:
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


def write_images(folder: Path, size: int) -> Path:
    """Two classes of six images: reddish and bluish noise."""
    noise = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 220)), ("red", (220, 50, 40))):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.array(colour) + noise.normal(0, 25, (size, size, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("name", "channels", "dropped"),
    [("sd15", 4, 3), ("sdxl", 4, 3), ("sd3", 16, 3), ("flux_dev", 16, 3), ("sana", 32, 4)],
)
def test_a_network_is_fitted_to_the_vae_of_every_family(
    name: str, channels: int, dropped: int, family_folder: Folder, tmp_path: Path
) -> None:
    size = RESOLUTION[name]
    teacher = load_teacher(str(family_folder(name)), resolution=size)
    fit(
        write_images(tmp_path / "set", size),
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
    assert (distance(a, b, generator) > 0).all()
    assert float(distance(a, a, generator).abs().max()) < 1e-6


def test_a_network_that_does_not_fit_is_refused_with_both_remedies(
    family_folder: Folder, tmp_path: Path
) -> None:
    teacher = load_teacher(str(family_folder("flux_dev")), resolution=64)
    for perceptual, message in (
        ("pocket", "reads 4 channels; flux_dev's latents have 16"),
        ("nowhere", "'nowhere' is not a perceptual network"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build_distance(Recipe(perceptual=perceptual), torch.device("cpu"), teacher)
        assert "perceptual fit --images" in str(error.value)
        assert "perceptual=teacher" in str(error.value)
    with pytest.raises(ValueError, match="but pixel_lpips compares images; set perceptual to"):
        Recipe(perceptual="teacher", loss="pixel_lpips")


def test_the_pocket_network_for_another_vae_gives_a_warning(
    family_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    build_distance(Recipe(), torch.device("cpu"), load_teacher(str(family_folder("sd15"))))
    assert "fitted to another VAE than sd15's" in capsys.readouterr().err
    build_distance(Recipe(), torch.device("cpu"), load_teacher("pocket"))
    assert "warning" not in capsys.readouterr().err
