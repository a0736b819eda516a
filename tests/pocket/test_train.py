"""The stages of `pocket train` for the perceptual networks at tiny sizes, and `publish`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion2gan.perceptual.distance import LatentLPIPS, PixelLPIPS
from diffusion2gan.pocket import models, scenes
from diffusion2gan.pocket import train as stages
from diffusion2gan.pocket.triplets import SUBSETS, make_triplet
from diffusion2gan.teacher.autoencoder import encode


def test_networks_are_trained_calibrated_and_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = models.vae().eval()
    latents = encode(vae, scenes.draw(range(8), stages.WORLD).images).half()
    run = stages.Run(tmp_path, scale=1e-6)  # 128 images per stage, the fewest
    latent_vgg = stages.train_latent_vgg(run, latents)
    pixel_vgg = stages.train_pixel_vgg(run, num_images=8)
    latent_heads = stages.calibrate(run, "calibrate_latent_vgg", latent_vgg, vae, num_triplets=2)
    pixel_heads = stages.calibrate(run, "calibrate_pixel_vgg", pixel_vgg, None, num_triplets=2)
    networks = {"latent_vgg": (latent_vgg, latent_heads), "pixel_vgg": (pixel_vgg, pixel_heads)}

    # Heads are non-negative and were changed
    for vgg, heads in networks.values():
        assert [len(head) for head in heads] == vgg.config["widths"]
        assert all(
            bool((head >= 0).all()) and not torch.equal(head, torch.ones_like(head))
            for head in heads
        )
    vocab_size = len(models.tokenizer())

    weights = stages.publish(
        tmp_path / "weights",
        vae,
        stages.Denoiser(vocab_size),
        models.clip(vocab_size),
        models.Probe(),
        networks,
    )

    # The published networks give the same distance, up to float16
    a, b = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    latent = LatentLPIPS.from_pretrained(weights / "latent_vgg")
    torch.testing.assert_close(
        latent(a, b), LatentLPIPS(*networks["latent_vgg"])(a, b), rtol=2e-2, atol=1e-3
    )
    pixel = PixelLPIPS.from_pretrained(weights / "pixel_vgg", vae=weights / "teacher")
    assert pixel(a, b).shape == (1,) and pixel.channels == 4
    assert "not on human judgements" in (weights / "pixel_vgg" / "README.md").read_text()


def test_only_the_latents_that_are_needed_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run with more images, in the same folder, encodes those as well."""
    drawn: list[int] = []

    def draw_images(indices: range, device: stages.Device = "cpu") -> torch.Tensor:
        drawn.extend(indices)
        return scenes.draw(indices, stages.WORLD).images.to(device)

    monkeypatch.setattr(stages, "draw_images", draw_images)
    torch.manual_seed(0)
    vae = models.vae().eval()
    few = stages.cache_latents(stages.Run(tmp_path, scale=1e-6), vae)
    assert few.shape == (128, 4, 16, 16)
    assert drawn == list(range(128))

    # Read, not encoded again
    assert torch.equal(stages.cache_latents(stages.Run(tmp_path, scale=1e-6), vae), few)
    assert len(drawn) == 128

    more = stages.cache_latents(stages.Run(tmp_path, scale=200 / stages.NUM_LATENTS), vae)
    assert more.shape == (200, 4, 16, 16)
    torch.testing.assert_close(more[:128], few)


@pytest.mark.parametrize("through_vae", [False, True])
def test_differences_of_triplets_sum_to_the_distance(through_vae: bool) -> None:
    torch.manual_seed(0)
    vae = models.vae().eval() if through_vae else None
    vgg = models.latent_vgg() if through_vae else models.pixel_vgg()
    judged = stages.compute_differences(vgg.eval(), vae, num_triplets=1, seed=4)
    assert judged.d0.shape == judged.d1.shape == (len(SUBSETS), sum(vgg.config["widths"]))
    assert judged.judge.shape == (len(SUBSETS),)

    distance = LatentLPIPS(vgg, [torch.ones(width) for width in vgg.config["widths"]])
    for row, subset in enumerate(SUBSETS):
        t = make_triplet(0, subset, 4)
        p0, p1, ref = (
            x[None] if vae is None else encode(vae, x[None]) for x in (t.p0, t.p1, t.ref)
        )
        assert float(judged.judge[row]) == t.judge
        torch.testing.assert_close(judged.d0[row].sum(), distance(p0, ref)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(judged.d1[row].sum(), distance(p1, ref)[0], rtol=1e-4, atol=1e-5)
