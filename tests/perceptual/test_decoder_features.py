"""The distance on the decoder's features against its formula on the complete VAE, per family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny_families import RESOLUTION
from torch import Tensor

from diffusion2gan.distill.losses import build_distance
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.perceptual.augment import BatchRows, apply_transform, draw_transform
from diffusion2gan.perceptual.decoder_features import (
    DecoderFeatures,
    ensembled_distance,
    plain_distance,
    standardized_differences,
)
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.pipeline import Teacher

Folder = Callable[[str], Path]
# A pipeline for every kind of VAE: two with quantisation convolutions, two without, AutoencoderDC
VAES = ("pocket", "sd15", "sdxl", "sd3", "flux_dev", "sana")


@pytest.fixture(params=VAES)
def teacher(request: pytest.FixtureRequest, family_folder: Folder) -> Teacher:
    if request.param == "pocket":
        return load_teacher("pocket")
    return load_teacher(str(family_folder(request.param)), resolution=RESOLUTION[request.param])


def latents(teacher: Teacher, count: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, count, *teacher.latent_shape, generator=g)
    return b + 0.5 * a, b


def reference(teacher: Teacher, a: Tensor, b: Tensor) -> Tensor:
    """The distance in float64, per sample and channel, on the features of a complete decode."""
    vae: Any = copy.deepcopy(teacher.vae).double()
    config = vae.config
    shift = getattr(config, "shift_factor", None) or 0.0

    # The blocks to read, and their upsampling
    if type(vae).__name__ == "AutoencoderDC":
        blocks = [vae.decoder.up_blocks[-1], vae.decoder.up_blocks[-2], vae.decoder.up_blocks[-3]]
    else:
        blocks = [vae.decoder.mid_block, vae.decoder.up_blocks[0], vae.decoder.up_blocks[1]]
    omegas = [1, 1 / 2, 1 / 4]

    def features(x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda module, args, output: outputs.append(output))
            for block in blocks
        ]
        vae.decode(x.double() / config.scaling_factor + shift)
        for handle in handles:
            handle.remove()
        return outputs

    maps_a, maps_b = features(a), features(b)
    rows = []
    for row in range(len(a)):
        total = torch.zeros((), dtype=torch.float64)
        for omega, map_a, map_b in zip(omegas, maps_a, maps_b, strict=True):
            assert map_b.shape[-1] == teacher.latent_shape[-1] / omega
            num_channels = map_b.shape[1]
            for channel in range(num_channels):
                values_a = map_a[row, channel].flatten()
                values_b = map_b[row, channel].flatten()
                mean, std = values_b.mean(), values_b.std(unbiased=False)
                standard_a, standard_b = (values_a - mean) / std, (values_b - mean) / std
                kept = standard_b.abs() <= 3
                error = (standard_a[kept] - standard_b[kept]).square().mean()
                total = total + omega * error / num_channels
        rows.append(total / sum(omegas))
    return torch.stack(rows)


def test_value_and_gradient_are_those_of_the_formula_on_the_complete_vae(teacher: Teacher) -> None:
    a, b = latents(teacher)
    a.requires_grad_()
    found = plain_distance(teacher)(a, b)
    expected = reference(teacher, a, b)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.shape == (2,) and (found > 0.01).all()

    (gradient,) = torch.autograd.grad(found.sum(), a)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), a)
    largest = float(expected_gradient.abs().max())
    assert largest > 1e-4
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * largest)


def test_transforms_are_applied_to_both_latents(teacher: Teacher) -> None:
    a, b = latents(teacher)
    plain = plain_distance(teacher)
    transform = draw_transform(2, ("geometric", "cutout"), torch.Generator().manual_seed(3))
    expected = plain(apply_transform(a, transform), apply_transform(b, transform))
    ensembled = ensembled_distance(teacher, {})
    found = ensembled(a, b, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected)

    # Rows of a batch are independent, and get the transforms of the full batch
    for row in range(2):
        rows = BatchRows(slice(row, row + 1), 2)
        alone = ensembled(
            a[row : row + 1], b[row : row + 1], torch.Generator().manual_seed(3), rows
        )
        torch.testing.assert_close(alone, found[row : row + 1], rtol=1e-4, atol=1e-6)


def test_the_vae_is_unchanged_and_its_last_blocks_are_not_run(teacher: Teacher) -> None:
    a, b = latents(teacher)
    before = {key: value.clone() for key, value in teacher.vae.state_dict().items()}
    images = teacher.decode(a)
    distance = plain_distance(teacher)
    assert torch.equal(distance(a, a), torch.zeros(2))
    assert list(distance.parameters()) == []

    # The copy shares its tensors, and lacks the blocks after the second up block
    features = DecoderFeatures(teacher.vae)
    shared = {tensor.data_ptr() for tensor in teacher.vae.parameters()}
    assert all(tensor.data_ptr() in shared for tensor in features.parameters())
    num_run = len(features.decoder.up_blocks)
    expected_run = 3 if type(teacher.vae).__name__ == "AutoencoderDC" else 2
    assert num_run == expected_run < len(teacher.vae.decoder.up_blocks)

    assert torch.equal(teacher.decode(a), images)
    after = teacher.vae.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert after.keys() == before.keys() and (plain_distance(teacher)(a, b) > 0).all()


def test_outliers_of_the_target_are_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 3, 8, 8, generator=g)
    clean = standardized_differences([a], [b])[0]
    b[0, 1, 2, 3] = 1e4
    assert float((b[0, 1] - b[0, 1].mean()).abs().max() / b[0, 1].std()) > 3
    found = standardized_differences([a], [b])[0]

    # Without the outlier's pixel the channel's errors are tiny beside its standard deviation
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2, 3] = False
    variance = b[0, 1].var(unbiased=False)
    expected = (a[0, 1] - b[0, 1]).square()[kept].mean() / variance
    torch.testing.assert_close(found[0, 1], expected)
    torch.testing.assert_close(found[0, [0, 2]], clean[0, [0, 2]])

    # An outlier of a alone is an error like any other
    a[0, 0, 0, 0] = 1e4
    assert float(standardized_differences([a], [b])[0][0, 0]) > 1e5


def test_a_target_of_one_colour_has_a_finite_distance_and_gradient() -> None:
    """σ is 0 in every channel; it is replaced by a hundredth of the root mean square."""
    a = (2 + 0.01 * torch.randn(1, 3, 8, 8)).requires_grad_()
    b = torch.full((1, 3, 8, 8), 2.0)
    (found,) = standardized_differences([a], [b])
    expected = (a - b).square().mean((2, 3)) / 0.02**2
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert gradient.isfinite().all()
    assert torch.equal(standardized_differences([b], [b])[0], torch.zeros(1, 3))
    black = torch.zeros(1, 3, 8, 8)
    assert torch.equal(standardized_differences([black], [black])[0], torch.zeros(1, 3))


@pytest.mark.parametrize("loss", ["latent_lpips", "e_latent_lpips"])
@pytest.mark.parametrize("name", ["sd15", "sana"])
def test_a_student_is_trained_with_the_decoders_features(
    name: str, loss: Any, family_folder: Folder, tmp_path: Path
) -> None:
    folder = str(family_folder(name))
    teacher = load_teacher(folder, resolution=RESOLUTION[name])
    spec = PairsSpec(teacher.name, teacher.revision, "words", 4, 0, 2, 3.0, teacher.latent_shape, 4)
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, tmp_path / "pairs")
    recipe = Recipe(
        teacher=folder,
        resolution=RESOLUTION[name],
        perceptual="decoder",
        loss=loss,
        total_pairs=6,
        batch_size=2,
        adversarial_weight=0,
    )
    assert recipe.needs_vae and not recipe.needs_teacher
    distill(recipe, tmp_path / "pairs", tmp_path / "run")
    assert '"skipped": 0' in (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]


def test_only_losses_that_decode_need_the_vae() -> None:
    assert Recipe(loss="pixel_lpips").needs_vae
    assert not Recipe(loss="e_latent_lpips").needs_vae
    assert not Recipe(loss="mse", perceptual="decoder").needs_vae
    with pytest.raises(ValueError, match="'decoder' are features of latents, but pixel_lpips"):
        Recipe(perceptual="decoder", loss="pixel_lpips")


def test_an_unknown_vae_and_features_that_are_not_finite_are_refused(
    family_folder: Folder,
) -> None:
    teacher = load_teacher(str(family_folder("sd15")))
    recipe = Recipe(perceptual="decoder")

    # One huge bias, as a precision that its values exceed
    bias = teacher.vae.decoder.mid_block.resnets[0].conv2.bias
    with torch.no_grad():
        bias[0] = float("inf")
    with pytest.raises(UserError, match=r"sd15's decoder are not finite in torch\.float32 for"):
        build_distance(recipe, teacher.device, teacher)

    teacher.vae = AutoencoderTiny()
    with pytest.raises(
        UserError, match="of AutoencoderKL or AutoencoderDC, but this VAE is a AutoencoderTiny"
    ):
        build_distance(recipe, teacher.device, teacher)
