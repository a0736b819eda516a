"""PixelLPIPS against decoding explicitly, and its VAE: frozen, hidden, scaled once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffusion2gan import PixelLPIPS, assets
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.perceptual.augment import BatchRows
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS
from diffusion2gan.perceptual.ranking import two_afc
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.perceptual.weights import load_network
from diffusion2gan.pocket import models, triplets
from diffusion2gan.teacher.autoencoder import decode, encode, load_vae, spatial_factor


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = models.vae()
        vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
        return vae.eval()


@pytest.fixture(scope="module")
def network() -> tuple[VGG, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return VGG(3, (8, 8, 8, 8, 8), 0).eval(), [torch.rand(8) for _ in range(5)]


def latents(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_pixel_lpips_is_lpips_of_the_decoded_images(
    vae: AutoencoderKL, network: tuple[VGG, list[Tensor]]
) -> None:
    a, b = latents(1), latents(2)
    with torch.no_grad():
        images = [vae.decode(x / 0.7 + 0.1).sample for x in (a, b)]
    assert images[0].shape == (2, 3, 32, 32)
    found = PixelLPIPS(*network, vae)(a, b)
    torch.testing.assert_close(found, LatentLPIPS(*network)(*images), rtol=1e-5, atol=1e-6)
    assert torch.equal(PixelLPIPS(*network, vae)(a, a), torch.zeros(2))


def test_the_vae_is_frozen_and_hidden(
    vae: AutoencoderKL, network: tuple[VGG, list[Tensor]]
) -> None:
    distance = PixelLPIPS(*network, vae)
    outer = nn.ModuleDict({"distance": distance}).train().requires_grad_(True)
    assert list(outer.parameters()) == [] and not vae.training
    a, b = latents(1).requires_grad_(), latents(2).requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad is not None and float(a.grad.abs().sum()) > 0 and b.grad is None
    assert all(p.grad is None for p in vae.parameters())
    with pytest.raises(UserError, match=r"this network reads \[B, 4, h, w\]"):
        distance(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_encode_and_decode_scale_inversely(vae: AutoencoderKL) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator).clamp(-1, 1)
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
        torch.testing.assert_close(encode(vae, images), (mean - 0.1) * 0.7)
        torch.testing.assert_close(
            decode(vae, encode(vae, images)), vae.decode(mean).sample, rtol=1e-4, atol=1e-5
        )
    assert spatial_factor(vae) == 4


def test_a_network_loads_with_any_vae(
    vae: AutoencoderKL, network: tuple[VGG, list[Tensor]], tiny_teacher: Path, tmp_path: Path
) -> None:
    LatentLPIPS(*network).save_pretrained(tmp_path / "network")
    vae.save_pretrained(tmp_path / "vae")
    a, b = latents(1), latents(2)
    loaded = PixelLPIPS.from_pretrained(tmp_path / "network", vae=tmp_path / "vae")
    assert torch.equal(loaded(a, b), PixelLPIPS(*network, vae)(a, b))
    of_pipeline = PixelLPIPS.from_pretrained(tmp_path / "network", vae=load_vae(tiny_teacher))
    assert of_pipeline(a, b).shape == (2,)

    with pytest.raises(UserError, match="contains no VAE"):
        PixelLPIPS.from_pretrained(tmp_path / "network", vae=tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs their VAE"):
        PixelLPIPS.from_pretrained(tmp_path / "network")
    with pytest.raises(
        UserError, match="this network reads 4 channels: it is a network for latents"
    ):
        PixelLPIPS.from_pretrained(assets.folder("latent_vgg"), vae=vae)
    assert 'vae="your VAE")' in (tmp_path / "network" / "README.md").read_text()


def test_bfloat16_is_close_and_float16_on_a_cpu_is_refused(
    vae: AutoencoderKL, network: tuple[VGG, list[Tensor]]
) -> None:
    a, b = latents(1), latents(2)
    exact = PixelLPIPS(*network, vae)(a, b)
    reduced = PixelLPIPS(*copy.deepcopy(network), copy.deepcopy(vae)).bfloat16()
    torch.testing.assert_close(reduced(a, b), exact, rtol=0.05, atol=0.02)
    with pytest.raises(UserError, match="float16"):
        reduced.half()(a, b)


def test_all_distances_have_one_interface(
    vae: AutoencoderKL, network: tuple[VGG, list[Tensor]]
) -> None:
    a, b = latents(1), latents(2)
    pixels, plain, ensembled = (
        PixelLPIPS(*network, vae),
        LatentLPIPS.from_pretrained(),
        ELatentLPIPS.from_pretrained(),
    )
    rows = BatchRows(slice(0, 2), 4)
    for distance in (pixels, plain, ensembled):
        first, second = (distance(a, b, torch.Generator().manual_seed(0), rows) for _ in range(2))
        assert torch.equal(first, second) and first.shape == (2,)


def test_rows_of_a_batch_get_the_transforms_of_the_full_batch() -> None:
    distance = ELatentLPIPS.from_pretrained()
    a, b = torch.cat([latents(1), latents(3)]), torch.cat([latents(2), latents(4)])
    full = distance(a, b, torch.Generator().manual_seed(0))
    for rows in (slice(0, 1), slice(1, 4)):
        batch_rows = BatchRows(rows, len(a))
        alone = distance(a[rows], b[rows], torch.Generator().manual_seed(0), batch_rows)
        torch.testing.assert_close(alone, full[rows])


@pytest.mark.parametrize("name", ["latent_vgg", "pixel_vgg"])
def test_shipped_networks_detect_which_image_is_distorted_further(name: str) -> None:
    """Calibrated on the triplets of seed 0, scored on those of seed 1; chance is one half."""
    vgg, heads, _ = load_network(assets.folder(name), name)
    assert not any(torch.equal(head, torch.ones_like(head)) for head in heads)

    distance = LatentLPIPS(vgg, heads)
    vae = load_vae("pocket")
    for subset in triplets.DISTORTIONS:
        drawn = [triplets.make_triplet(number, subset, seed=1) for number in range(12)]
        p0 = torch.stack([triplet.p0 for triplet in drawn])
        p1 = torch.stack([triplet.p1 for triplet in drawn])
        ref = torch.stack([triplet.ref for triplet in drawn])
        if name == "latent_vgg":
            p0, p1, ref = encode(vae, p0), encode(vae, p1), encode(vae, ref)
        judge = torch.tensor([triplet.judge for triplet in drawn])
        assert two_afc(distance(p0, ref), distance(p1, ref), judge) >= 0.9, subset


def test_a_missing_shipped_network_is_reported(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    with pytest.raises(Failure, match="no pocket pixel_vgg"):
        PixelLPIPS.from_pretrained("pocket", vae=vae)
