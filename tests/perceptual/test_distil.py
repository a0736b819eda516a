"""`perceptual distil`: targets, objective, resuming, ranks, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill.rank_processes import torchrun, wait_for_success
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.cost.perceptual import plan_distil
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.store import Pairs, PairsSpec, open_set, read_shard, start_set, write_shard
from diffusion2gan.perceptual import distil as module
from diffusion2gan.perceptual.augment import TransformSettings
from diffusion2gan.perceptual.distance import LatentLPIPS, PixelLPIPS, apply_heads
from diffusion2gan.perceptual.distil import (
    Batch,
    DistilSettings,
    Learner,
    distil,
    distillation_loss,
)
from diffusion2gan.perceptual.perturb import KINDS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.perceptual.weights import load_network
from diffusion2gan.runtime import checkpoint, trainer
from diffusion2gan.teacher.autoencoder import load_vae

COUNT = 16
MIN_LATENTS = module.MIN_LATENTS
WIDTHS = (4, 4, 8, 8, 8)
SETTINGS = DistilSettings(WIDTHS, count=COUNT, epochs=10, batch_size=4)


def write_set(folder: Path, count: int = COUNT, scale: float = 1.0) -> Path:
    """The first pairs of the shipped set, in shards of 8, their latents × `scale`."""
    shipped = assets.folder("pairs")
    spec = replace(open_set(shipped), count=count, shard_size=8)
    pairs = read_shard(shipped, 0)
    start_set(folder, spec)
    for shard in range(spec.num_shards):
        rows = pairs.rows(list(spec.shard_indices(shard)))
        write_shard(folder, shard, spec, replace(rows, latents=rows.latents * scale))
    return folder


@pytest.fixture(scope="module")
def small() -> Any:
    """A set of 16 latents is enough for the tests; four of them are held out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_LATENTS", COUNT)
        patch.setattr(module, "MIN_HELD_OUT", 4)
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("pairs") / "set")


@pytest.fixture(scope="module")
def distilled(pairs: Path, small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the tests: copy it before you change it."""
    out = tmp_path_factory.mktemp("distilled") / "network"
    assert distil(pairs, "pocket", "pocket", out, SETTINGS) is not None
    return out


def copy_cache(source: Path, out: Path) -> Path:
    """A new folder with the decoded targets of a finished one."""
    for name in ("train", "held_out"):
        shutil.copytree(source / "work" / name, out / "work" / name)
    return out


def load_chunk(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load(folder / "00000000.safetensors")[0]


def test_the_network_is_written_with_its_held_out_agreement(distilled: Path) -> None:
    distance = LatentLPIPS.from_pretrained(distilled)
    vgg, heads = distance._frozen
    assert vgg.config["widths"] == list(WIDTHS) and vgg.num_dropped == 2
    assert all(bool((head >= 0).all()) for head in heads)

    # The report is that of the written network
    result = json.loads((distilled / "distil.json").read_text())
    assert (result["trained_on"], result["held_out_latents"]) == (12, 4)
    chunk = load_chunk(distilled / "work" / "held_out")
    a, x = chunk["perturbed"].float(), chunk["latents"].float()
    found = torch.stack([distance(a[:, k], x) for k in range(8)], 1)
    expected = chunk["layers"].sum(2)
    agreement = module.choice_agreement(found, expected)
    assert result["held_out"]["choice_agreement"] == pytest.approx(agreement)
    assert -1 < result["held_out"]["gradient_cosine"] < 1
    assert f"2AFC agreement {agreement:.1%}" in (distilled / "README.md").read_text()


def test_targets_are_the_distances_of_the_decoded_images(distilled: Path, pairs: Path) -> None:
    target = PixelLPIPS.from_pretrained("pocket")
    latents = read_shard(pairs, 0).latents
    chunk = load_chunk(distilled / "work" / "train")
    assert torch.equal(chunk["latents"][:8].float(), latents)

    a = chunk["perturbed"][2].float().requires_grad_()
    expected = target(a, latents[2:3].expand(8, -1, -1, -1))
    torch.testing.assert_close(chunk["layers"][2].sum(1), expected.detach(), rtol=1e-4, atol=1e-6)
    heads = target._frozen[1]
    differences = target.differences(a, latents[2:3].expand(8, -1, -1, -1))
    first_layer = apply_heads(differences[:1], heads[:1])
    torch.testing.assert_close(chunk["layers"][2, :, 0], first_layer.detach(), rtol=1e-4, atol=1e-6)

    (gradient,) = torch.autograd.grad(expected.sum(), a)
    rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(chunk["gradient"][2].float(), gradient / rms, rtol=1e-2, atol=2e-2)

    # Every kind but that of students occurs, equally often
    counts = chunk["kind"].flatten().bincount(minlength=len(KINDS))
    assert counts[:6].tolist() == [16] * 6 and counts[6] == 0


def test_training_brings_the_distances_near_their_targets(distilled: Path) -> None:
    chunk = load_chunk(distilled / "work" / "train")
    a, x = chunk["perturbed"].float(), chunk["latents"].float()
    layers = chunk["layers"].flatten(0, 1)
    torch.manual_seed(0)
    before = Learner(VGG(4, WIDTHS, 2), layers.mean(0)).eval()
    vgg, heads = LatentLPIPS.from_pretrained(distilled)._frozen
    after = Learner(vgg, torch.zeros(5)).eval()
    errors = []
    for learner in (before, after):
        if learner is after:
            for parameter, head in zip(after.heads, heads, strict=True):
                parameter.data = head
        with torch.no_grad():
            found = learner(a, x).sum(1)
        errors.append(float(module.log_error(found, layers.sum(1), 1e-3)))
    assert errors[1] < 0.8 * errors[0]


def random_batch() -> tuple[Learner, Batch]:
    learner = Learner(VGG(4, WIDTHS, 2), torch.ones(5)).eval()
    x = torch.randn(2, 4, 16, 16)
    perturbed = x[:, None] + 0.3 * torch.randn(2, 3, 4, 16, 16)
    return learner, Batch(x, perturbed, torch.rand(6, 5), torch.randn(6, 4, 16, 16))


def test_the_learner_is_latent_lpips_of_its_network() -> None:
    learner, batch = random_batch()
    distance = LatentLPIPS(learner.vgg, [head.detach() for head in learner.heads])
    expected = distance(batch.perturbed.flatten(0, 1), batch.latents.repeat_interleave(3, 0))
    found = learner(batch.perturbed, batch.latents).sum(1)
    torch.testing.assert_close(found.detach(), expected)


def test_the_objective_is_its_formula_and_zero_at_the_target() -> None:
    learner, batch = random_batch()
    d = learner(batch.perturbed, batch.latents).detach().double()
    t = batch.layers.double()
    eps = 1e-3 * 2.0
    total = ((d.sum(1) + eps).log() - (t.sum(1) + eps).log()).square().mean()
    layers = ((d + eps / 5).log() - (t + eps / 5).log()).square().mean()
    found = distillation_loss(learner, batch, 2.0, 0.0).detach()
    assert float(found) == pytest.approx(float(total + 0.5 * layers), rel=1e-4)

    # The gradient's direction, whatever its length
    a = batch.perturbed.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(learner(a, batch.latents).sum(), a)
    at_target = replace(batch, layers=d.float(), gradient=7 * gradient.flatten(0, 1))
    assert float(distillation_loss(learner, at_target, 2.0, 1.0).detach()) == pytest.approx(
        0, abs=1e-5
    )
    opposite = replace(at_target, gradient=-gradient.flatten(0, 1))
    assert float(distillation_loss(learner, opposite, 2.0, 0.5).detach()) == pytest.approx(
        1, abs=1e-4
    )


def test_the_gradients_direction_is_trained_through_the_weights() -> None:
    learner, batch = random_batch()
    learner.train()
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = distillation_loss(learner, batch, 2.0, 1.0)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in learner.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_an_interrupted_run_gives_the_same_bits(
    distilled: Path, pairs: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_EVERY_S", 0.0)
    out = copy_cache(distilled, tmp_path / "out")
    steps = iter(range(100))
    original = module.distillation_loss

    def interrupt_seventh_step(*args: Any) -> Tensor:
        if next(steps) == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "distillation_loss", interrupt_seventh_step)
    with pytest.raises(KeyboardInterrupt):
        distil(pairs, "pocket", "pocket", out, SETTINGS)
    assert not (out / "model.safetensors").exists() and not (out / "distil.json").exists()

    before = (out / "work" / "train" / "00000000.safetensors").stat().st_mtime_ns
    distil(pairs, "pocket", "pocket", out, SETTINGS)
    assert (out / "work" / "train" / "00000000.safetensors").stat().st_mtime_ns == before
    assert (out / "model.safetensors").read_bytes() == (
        distilled / "model.safetensors"
    ).read_bytes()

    # Other settings of the training or of the targets are refused
    with pytest.raises(UserError, match="was made with epochs = 10, but this command has 5"):
        distil(pairs, "pocket", "pocket", out, replace(SETTINGS, epochs=5))
    with pytest.raises(UserError, match=r"was made with seed = 0, but this command has 1"):
        distil(pairs, "pocket", "pocket", out, replace(SETTINGS, seed=1))


@pytest.mark.slow
def test_a_compact_network_is_narrower_and_its_cost_is_compared(
    distilled: Path, pairs: Path, small: None, tmp_path: Path
) -> None:
    out = copy_cache(distilled, tmp_path / "out")
    settings = replace(SETTINGS, widths=(16, 16, 32, 32, 32), compact=True, epochs=1)
    result = distil(pairs, "pocket", "pocket", out, settings)
    assert result is not None
    assert result["widths"] == [6, 6, 12, 12, 12]
    cost = result["cost"]
    assert cost["times_cheaper"] == pytest.approx(cost["full_ms"] / cost["ms"])
    assert (
        LatentLPIPS.from_pretrained(out)(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16))[0]
        == 0
    )


@pytest.mark.slow
def test_students_and_transforms_add_their_perturbations(
    pairs: Path, small: None, tmp_path: Path
) -> None:
    """A student's latents are x0 at the last timestep, from the pair's noise and prompt."""
    transforms = TransformSettings(("geometric", "cutout"), share=0.5, resampling="bicubic")
    settings = replace(SETTINGS, transforms=transforms, epochs=1, gradient_weight=0.0)
    student = str(assets.folder("teacher"))
    out = tmp_path / "out"
    result = distil(pairs, "pocket", "pocket", out, settings, [student])
    assert result is not None and result["num_students"] == 1
    assert "student" in result["held_out"]["rank_correlation_by_kind"]
    assert result["transforms"]["share"] == 0.5

    # Of the latents about half are transformed
    chunk = load_chunk(out / "work" / "train")
    assert "gradient" not in chunk
    original = torch.cat([read_shard(pairs, shard).latents for shard in range(2)])[:12]
    same = (chunk["latents"].float() == original).flatten(1).all(1)
    assert 1 < int(same.sum()) < 11


# What is refused


def refuse(match: str, out: Path, *args: Any, **changes: Any) -> None:
    with pytest.raises(UserError, match=match):
        distil(*args, out, replace(SETTINGS, **changes))
    assert not (out / "model.safetensors").exists() and not (out / "work").exists()


def test_sets_of_another_vae_or_scale_are_refused(
    pairs: Path, small: None, tiny_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refuse(
        r"does not reproduce the latents .* differ by \d+% of their variance, where 25% .* "
        "give the VAE of the set's teacher, pocket",
        out,
        *(pairs, str(tiny_teacher), "pocket"),
    )
    unscaled = write_set(tmp_path / "unscaled", scale=5.0)
    refuse(
        r"standard deviation of 5\.\d, where 0.4 to 2.5 is plausible: .* × scaling_factor",
        out,
        *(unscaled, "pocket", "pocket"),
    )

    # Another number of channels
    spec = replace(open_set(pairs), latent_shape=(8, 16, 16), count=8)
    latents = torch.randn(8, 8, 16, 16)
    other = tmp_path / "other"
    start_set(other, spec)
    first = read_shard(pairs, 0)
    write_shard(other, 0, spec, Pairs(first.index, first.seed, first.prompts, latents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_LATENTS", 8)
        refuse("have 8 channels, those of the VAE pocket have 4", out, *(other, "pocket", "pocket"))


def test_too_few_latents_and_incomplete_sets_are_refused(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(module, "MIN_LATENTS", MIN_LATENTS)
    refuse("has 16 latents; at least 200 are needed", out, pairs, "pocket", "pocket")
    monkeypatch.setattr(module, "MIN_LATENTS", COUNT)
    refuse("--count has 10 latents; at least 16", out, pairs, "pocket", "pocket", count=10)
    partial = Path(shutil.copytree(pairs, tmp_path / "partial"))
    (partial / "pairs-00001.parquet").unlink()
    refuse(
        r"is not complete: 1 of the 2 shards .* \(first: shard 1", out, partial, "pocket", "pocket"
    )
    refuse("five are needed", out, pairs, "pocket", "pocket", widths=(4, 4))


def test_unsuitable_vaes_and_networks_are_refused(pairs: Path, small: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unknown = tmp_path / "vae"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    refuse(
        "of the class AutoencoderTiny; supported are AutoencoderKL and AutoencoderDC",
        out,
        *(pairs, str(unknown), "pocket"),
    )

    # A network on latents in the place of one on images
    latent = str(assets.folder("latent_vgg"))
    refuse("compares images, but this network reads 4 channels", out, pairs, "pocket", latent)

    # A network with negative heads, and one of another architecture
    vgg, heads, formula = load_network("pocket", "pixel_vgg")
    folder = tmp_path / "network"
    LatentLPIPS(vgg, heads, **formula).save_pretrained(folder)
    tensors, _ = checkpoint.load(folder / "model.safetensors")
    damaged = dict(tensors)
    damaged["heads/2"] = damaged["heads/2"] - 0.5
    checkpoint.save(folder / "model.safetensors", damaged, {})
    refuse(r"heads/2 in .*network has \d+ negative weights", out, pairs, "pocket", str(folder))
    damaged = dict(tensors)
    damaged["vgg/stages.0.0.weight"] = torch.zeros(16, 3, 5, 5)
    checkpoint.save(folder / "model.safetensors", damaged, {})
    refuse(
        r"stages.0.0.weight is \[16, 3, 5, 5\], \[16, 3, 3, 3\] is expected",
        out,
        *(pairs, "pocket", str(folder)),
    )
    refuse("float16 on a CPU", out, pairs, "pocket", "pocket", precision="float16")


def test_nan_from_the_decoder_is_refused_with_its_precision(
    pairs: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer overflows; encoding still works, so the set's check passes first."""
    monkeypatch.setattr(module, "check_latents", lambda *args: None)
    vae = load_vae("pocket")
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(3e38)
    vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"NaN or infinite in float32: the decoder of .*vae"):
        distil(pairs, str(tmp_path / "vae"), "pocket", out, SETTINGS)
    assert not (out / "model.safetensors").exists()

    half = replace(SETTINGS, precision="float16")
    target = PixelLPIPS.from_pretrained("pocket")
    spec: PairsSpec = open_set(pairs)
    targets = module.Targets(pairs, spec, "pocket", "pocket", half, target, [], torch.device("cpu"))
    with pytest.raises(UserError, match=r"in float16: .*use --precision float32 \(or bfloat16\)"):
        targets.check_finite(torch.tensor([1.0, torch.nan]))


def test_the_dry_run_counts_the_compute(pairs: Path) -> None:
    without = plan_distil(pairs, "pocket", "pocket", replace(SETTINGS, gradient_weight=0.0))
    with_gradient = plan_distil(pairs, "pocket", "pocket", SETTINGS)
    assert (without["latents"], without["perturbations"]) == (16, 128)

    # The network on images by hand: 3×3 convolutions at 64² … 4², two operations per multiply-add
    macs = 0
    channels, side = 3, 64
    for num_convolutions, width in zip((2, 2, 3, 3, 3), (16, 32, 64, 96, 96), strict=True):
        for _ in range(num_convolutions):
            macs += 9 * channels * width * side**2
            channels = width
        side //= 2
    assert without["compare_tflop"] == pytest.approx(2 * macs / 1e12, abs=5e-5)
    assert float(with_gradient["hours_h100"]) >= float(without["hours_h100"])
    assert "not measured" in str(without["assumed"])


@pytest.mark.slow
def test_two_ranks_train_one_network(pairs: Path, tmp_path: Path) -> None:
    """Both ranks decode and learn; the main rank writes one network, with its report."""
    script = tmp_path / "distil.py"
    script.write_text(
        "from diffusion2gan import cli\n"
        "from diffusion2gan.perceptual import distil\n"
        "distil.MIN_LATENTS, distil.MIN_HELD_OUT = 16, 4\n"
        "distil.CHUNK = 4\n"
        "cli.main()\n"
    )
    arguments = ["perceptual", "distil", "--pairs", pairs, "--vae", "pocket", "--from", "pocket"]
    arguments += ["--widths", "4,4,8,8,8", "--epochs", "4", "--batch-size", "4"]
    arguments += ["--out", tmp_path / "out"]
    wait_for_success(torchrun(2, script, *arguments))
    result = json.loads((tmp_path / "out" / "distil.json").read_text())
    assert result["trained_on"] == 12
    LatentLPIPS.from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out" / "work" / "train").glob("*.safetensors"))) == 3
