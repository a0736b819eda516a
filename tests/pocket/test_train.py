"""The stages of `pocket train` that make the perceptual networks, at tiny sizes, and what is published of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.perceptual.distance import LatentLPIPS, PixelLPIPS
from diffusion2gan.pocket import models, scenes
from diffusion2gan.pocket import train as stages
from diffusion2gan.pocket.triplets import SUBSETS, triplet
from diffusion2gan.teacher.autoencoder import encode


def test_networks_are_trained_calibrated_and_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = models.vae().eval()
    latents = encode(vae, scenes.draw(range(8), stages.WORLD).images).half()
    made = {
        "latent_vgg": (stages.train_latent_vgg(tmp_path, latents, 32, 0), vae),
        "pixel_vgg": (stages.train_pixel_vgg(tmp_path, 8, 32, 0), None),
    }
    networks = {
        name: (vgg, stages.calibrate(f"calibrate_{name}", tmp_path, vgg, coder, 2, 0))
        for name, (vgg, coder) in made.items()
    }
    for vgg, heads in networks.values():
        assert [len(head) for head in heads] == vgg.config["widths"]
        assert all(
            bool((head >= 0).all()) and not torch.equal(head, torch.ones_like(head))
            for head in heads
        )
    words = models.tokenizer()
    weights = stages.publish(
        tmp_path / "weights",
        vae,
        stages.Denoiser(len(words)),
        models.clip(len(words)),
        models.Probe(),
        networks,
    )
    a, b = torch.randn(2, 1, 4, 16, 16)
    latent = LatentLPIPS.from_pretrained(weights / "latent_vgg")
    torch.testing.assert_close(
        latent(a, b), LatentLPIPS(*networks["latent_vgg"])(a, b), rtol=2e-2, atol=1e-3
    )
    pixel = PixelLPIPS.from_pretrained(weights / "pixel_vgg", vae=weights / "teacher")
    assert pixel(a, b).shape == (1,) and pixel.channels == 4
    assert "not on human judgements" in (weights / "pixel_vgg" / "README.md").read_text()


@pytest.mark.parametrize("through_vae", [False, True])
def test_differences_of_triplets_are_the_distances_own(through_vae: bool) -> None:
    torch.manual_seed(0)
    vae = models.vae().eval() if through_vae else None
    vgg = models.latent_vgg() if through_vae else models.pixel_vgg()
    d0, d1, judge = stages.differences_of(vgg.eval(), vae, 1, seed=4)
    assert d0.shape == d1.shape == (len(SUBSETS), sum(vgg.config["widths"])) and judge.shape == (
        len(SUBSETS),
    )
    distance = LatentLPIPS(vgg, [torch.ones(width) for width in vgg.config["widths"]])
    for row, subset in enumerate(SUBSETS):
        t = triplet(0, subset, 4)
        p0, p1, ref = (
            x[None] if vae is None else encode(vae, x[None]) for x in (t.p0, t.p1, t.ref)
        )
        assert float(judge[row]) == t.judge
        torch.testing.assert_close(d0[row].sum(), distance(p0, ref)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(d1[row].sum(), distance(p1, ref)[0], rtol=1e-4, atol=1e-5)
