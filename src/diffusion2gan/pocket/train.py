"""`diffusion2gan pocket train`: every pocket model from nothing, stage by stage. Run it again to continue.

Training pictures are world 0. More pictures (`--scale`) on a better machine (`--device cuda`, not tried yet) train
better models by the same recipe. The shipped models saw as many pictures, but some of them from an earlier version of
the world, and their learning rates were changed on the way (docs/notes).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.ranking import JudgedDifferences, calibrate_heads
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.pocket import models, scenes, triplets
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.trainer import FitConfig, fit
from diffusion2gan.teacher.autoencoder import encode

Device = torch.device | str
WORLD = 0
NUM_PICTURES = {
    "vae": 44_000,
    "vae_crops": 96_000,
    "unet": 540_000,
    "clip": 100_000,
    "probe": 200_000,
    "latent_vgg": 150_000,
    "pixel_vgg": 64_000,
}
NUM_LATENTS = 65_536  # of training pictures, encoded once
NUM_TRIPLETS = 1000  # a sub-set
CALIBRATION_LR = 1e-3  # ten times LPIPS's: far fewer triplets
CAPTION_DROP = 0.1
KL_WEIGHT = 3e-4  # per latent number, against errors per pixel


def images_of(numbers: range, device: Device = "cpu") -> Tensor:
    return scenes.draw(numbers, WORLD).images.to(device)


def vae_loss(vae: AutoencoderKL, images: Tensor, mse_weight: float) -> Tensor:
    """L1 of pixels and of their horizontal and vertical differences (edges), squared error, KL to N(0, I)."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    edges = sum(
        (F.l1_loss(decoded.diff(dim=d), images.diff(dim=d)) for d in (2, 3)),
        start=images.new_zeros(()),
    )
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return (
        F.l1_loss(decoded, images)
        + edges
        + mse_weight * F.mse_loss(decoded, images)
        + KL_WEIGHT * kl
    )


def train_vae(
    folder: Path, num_pictures: int, num_crops: int, seed: int, device: Device = "cpu"
) -> AutoencoderKL:
    """Whole pictures first, then 32×32 crops, half of them with their colour channels shuffled.

    The first stage alone learns light and dark and one axis of colour (L1 cares little for small objects' hues); the
    squared error and the shuffled channels of the second teach it the rest.
    """
    torch.manual_seed(seed)
    vae = models.vae().to(device)
    fit(
        "vae",
        vae,
        lambda numbers: vae_loss(vae, images_of(numbers, device), 0.0),
        FitConfig(num_pictures, batch_size=16, peak_lr=2e-3, seed=seed),
        folder,
    )
    vae.requires_grad_(True)
    fit(
        "vae_crops",
        vae,
        lambda numbers: vae_loss(vae, crops_of(numbers).to(device), 4.0),
        FitConfig(num_crops, batch_size=16, peak_lr=2e-3, seed=seed),
        folder,
    )
    with torch.no_grad():
        std = vae.encode(images_of(range(10**6, 10**6 + 512), device)).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 4))
    return vae


def crops_of(numbers: range, size: int = 32) -> Tensor:
    """A random crop of each training picture; every second one with its channels in another order."""
    images, crops = images_of(numbers), []
    for place, image in enumerate(images):
        top, left = torch.randint(0, image.shape[1] - size + 1, (2,)).tolist()
        crop = image[:, top : top + size, left : left + size]
        crops.append(crop[torch.randperm(3)] if place % 2 else crop)
    return torch.stack(crops)


def attribute_targets(batch: scenes.Scenes) -> dict[str, Tensor]:
    """What `models.PARTS` asks of each picture: class numbers for count and ground, 0/1 tables for the rest."""
    size, rows = len(batch.count), torch.arange(len(batch.count))
    targets = {"count": batch.count - 1, "ground": batch.ground}
    targets |= {
        part: torch.zeros(size, n) for part, n in models.PARTS.items() if part not in targets
    }
    for k in range(3):
        there = batch.shape[:, k] >= 0
        row = rows[there]
        shape, colour, pattern = (
            label[there, k] for label in (batch.shape, batch.colour, batch.pattern)
        )
        targets["shape"][row, shape] = 1
        targets["colour"][row, colour] = 1
        targets["pattern"][row, pattern] = 1
        targets["shape_colour"][row, shape * len(scenes.COLOURS) + colour] = 1
        targets["shape_pattern"][row, shape * len(scenes.PATTERNS) + pattern] = 1
    return targets


def attribute_loss(logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of count and ground plus, for each 0/1 table, the binary cross-entropy summed over its cells."""
    parts = models.split(logits)
    targets = {part: target.to(logits.device) for part, target in targets.items()}
    loss = F.cross_entropy(parts["count"], targets["count"]) + F.cross_entropy(
        parts["ground"], targets["ground"]
    )
    for part in ("shape", "colour", "pattern", "shape_colour", "shape_pattern"):
        loss = (
            loss
            + F.binary_cross_entropy_with_logits(parts[part], targets[part], reduction="none")
            .sum(1)
            .mean()
        )
    return loss


def train_probe(folder: Path, num_pictures: int, seed: int, device: Device = "cpu") -> models.Probe:
    torch.manual_seed(seed)
    probe = models.Probe().to(device)

    def loss(numbers: range) -> Tensor:
        batch = scenes.draw(numbers, WORLD)
        images = batch.images + 0.06 * torch.rand(len(numbers), 1, 1, 1) * torch.randn_like(
            batch.images
        )
        return attribute_loss(probe(images.to(device)), attribute_targets(batch))

    fit(
        "probe",
        probe,
        loss,
        FitConfig(num_pictures, batch_size=32, peak_lr=2e-3, seed=seed),
        folder,
    )
    return probe


def token_ids(words: CLIPTokenizer, captions: list[str], device: Device) -> Tensor:
    """[B, MAX_LENGTH] int64."""
    ids = words(
        captions, padding="max_length", max_length=models.MAX_LENGTH, return_tensors="pt"
    ).input_ids
    return torch.as_tensor(ids).to(device)


def train_clip(folder: Path, num_pictures: int, seed: int, device: Device = "cpu") -> CLIPModel:
    """Symmetric contrastive loss over the batch (Radford et al. 2021)."""
    torch.manual_seed(seed)
    words = models.tokenizer()
    clip = models.clip(len(words)).to(device)

    def loss(numbers: range) -> Tensor:
        batch = scenes.draw(numbers, WORLD)
        logits = clip(
            input_ids=token_ids(words, batch.captions, device), pixel_values=batch.images.to(device)
        )
        logits = logits.logits_per_image
        own = torch.arange(len(numbers), device=device)
        return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))

    fit(
        "clip",
        clip,
        loss,
        FitConfig(num_pictures, batch_size=128, peak_lr=1e-3, seed=seed),
        folder,
    )
    return clip


@torch.no_grad()
def cache_latents(
    folder: Path, vae: AutoencoderKL, count: int, device: Device = "cpu", chunk: int = 4096
) -> Tensor:
    """[count, C, h, w] float16: posterior means × scaling_factor of training pictures 0 … count-1, made once."""
    chunks = []
    with Bar("latents", count) as bar:
        for start in range(0, count, chunk):
            path = folder / "latents" / f"{start:07d}.safetensors"
            if not path.exists():
                parts = [
                    vae.encode(
                        images_of(range(i, min(i + 64, start + chunk)), device)
                    ).latent_dist.mean
                    for i in range(start, start + chunk, 64)
                ]
                latents = (torch.cat(parts) * vae.config.scaling_factor).half()
                checkpoint.save(path, {"latents": latents}, {})
            chunks.append(checkpoint.load(path)[0]["latents"])
            bar.advance(len(chunks[-1]))
    return torch.cat(chunks)[:count].to(device)


class Denoiser(nn.Module):
    """The text encoder and the UNet, trained together."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = models.text_encoder(vocab_size)
        self.unet = models.unet()


def draw_timesteps(size: int) -> Tensor:
    """[size] int64 in 0 … 999, logit-normal (Esser et al. 2024, eq. 19) with mean −0.8 and deviation 1.2.

    Half lie below 310 and a fifth above 560: outlines and patterns are decided there; uniform timesteps spend almost
    half of the pictures above it, where small latents are all but noise.
    """
    return (1000 * torch.sigmoid(1.2 * torch.randn(size) - 0.8)).long().clamp(0, 999)


def train_unet(
    folder: Path, latents: Tensor, num_pictures: int, seed: int, device: Device = "cpu"
) -> Denoiser:
    """v-prediction (Salimans & Ho 2022, eq. 14): mean squared error of v = √ᾱ·ε − √(1−ᾱ)·x0 at `draw_timesteps`.

    One caption in ten is dropped, which is what classifier-free guidance needs.
    """
    torch.manual_seed(seed)
    words, scheduler = models.tokenizer(), models.scheduler()
    denoiser = Denoiser(len(words)).to(device)

    def loss(numbers: range) -> Tensor:
        places = [n % len(latents) for n in numbers]
        x0 = latents[places].float()
        kept = torch.rand(len(places)) >= CAPTION_DROP
        captions = [
            c if keep else "" for c, keep in zip(scenes.captions(places, WORLD), kept, strict=True)
        ]
        embeds = denoiser.text_encoder(token_ids(words, captions, device)).last_hidden_state
        timesteps, noise = draw_timesteps(len(places)).to(device), torch.randn_like(x0)
        x_t, v = (
            scheduler.add_noise(x0, noise, timesteps),
            scheduler.get_velocity(x0, noise, timesteps),
        )
        return F.mse_loss(denoiser.unet(x_t, timesteps, embeds).sample, v)

    fit(
        "unet",
        denoiser,
        loss,
        FitConfig(num_pictures, batch_size=32, peak_lr=1e-3, seed=seed),
        folder,
    )
    return denoiser


def train_vgg(
    stage: str,
    vgg: VGG,
    inputs: Callable[[scenes.Scenes, list[int]], Tensor],
    count: int,
    folder: Path,
    num_pictures: int,
    seed: int,
    device: Device = "cpu",
) -> VGG:
    """A feature network: the world's attributes read from `inputs(scenes, places)` of its first `count` pictures."""
    head = models.AttributeHead(vgg.config["widths"][-1])
    classifier = nn.ModuleDict({"vgg": vgg, "head": head}).to(device)

    def loss(numbers: range) -> Tensor:
        places = [n % count for n in numbers]
        batch = scenes.draw(places, WORLD)
        logits = head(vgg(inputs(batch, places))[-1])
        return attribute_loss(logits, attribute_targets(batch))

    fit(
        stage,
        classifier,
        loss,
        FitConfig(num_pictures, batch_size=32, peak_lr=1e-3, seed=seed),
        folder,
    )
    return vgg


def train_latent_vgg(
    folder: Path, latents: Tensor, num_pictures: int, seed: int, device: Device = "cpu"
) -> VGG:
    """The feature network of LatentLPIPS."""
    torch.manual_seed(seed)
    return train_vgg(
        "latent_vgg",
        models.latent_vgg(),
        lambda batch, places: latents[places].float(),
        len(latents),
        folder,
        num_pictures,
        seed,
        device,
    )


def train_pixel_vgg(
    folder: Path, count: int, num_pictures: int, seed: int, device: Device = "cpu"
) -> VGG:
    """Its twin for PixelLPIPS: the same pictures, before the VAE."""
    torch.manual_seed(seed)
    return train_vgg(
        "pixel_vgg",
        models.pixel_vgg(),
        lambda batch, places: batch.images.to(device),
        count,
        folder,
        num_pictures,
        seed,
        device,
    )


@torch.no_grad()
def differences_of(
    vgg: VGG, vae: AutoencoderKL | None, count: int, seed: int, device: Device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """d0, d1 [N, ΣC], judge [N] of `count` triplets a sub-set; with a VAE, of their latents."""
    distance = LatentLPIPS(vgg, [torch.ones(width) for width in vgg.config["widths"]])
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with Bar("triplets", count * len(triplets.SUBSETS)) as bar:
        for subset in triplets.SUBSETS:
            for number in range(count):
                made = triplets.triplet(number, subset, seed)
                images = torch.stack([made.p0, made.p1, made.ref]).to(device)
                p0, p1, ref = (images if vae is None else encode(vae, images)).chunk(3)
                d0, d1 = (torch.cat(distance.differences(p, ref), 1).cpu() for p in (p0, p1))
                rows.append((d0, d1, torch.tensor([made.judge])))
                bar.advance(1)
    d0, d1, judge = (torch.cat(column) for column in zip(*rows, strict=True))
    return d0, d1, judge


def calibrate(
    stage: str,
    folder: Path,
    vgg: VGG,
    vae: AutoencoderKL | None,
    count: int,
    seed: int,
    device: Device = "cpu",
) -> list[Tensor]:
    """Heads from graded distortions of scenes. What orders them is their grade: these are not human judgements."""
    heads = [torch.ones(width) for width in vgg.config["widths"]]
    d0, d1, judge = differences_of(vgg, vae, count, seed, device)
    return calibrate_heads(
        JudgedDifferences(d0, d1, judge),
        heads,
        folder=folder,
        stage=stage,
        peak_lr=CALIBRATION_LR,
        seed=seed,
    )


def train(folder: Path, seed: int = 0, scale: float = 1.0, device: Device = "cpu") -> Path:
    """Every stage in order, then `publish`; returns the folder of the finished weights."""
    num = {stage: max(128, int(count * scale)) for stage, count in NUM_PICTURES.items()}
    vae = train_vae(folder, num["vae"], num["vae_crops"], seed, device)
    clip = train_clip(folder, num["clip"], seed, device)
    probe = train_probe(folder, num["probe"], seed, device)
    latents = cache_latents(folder, vae, max(128, int(NUM_LATENTS * scale)), device)
    vgg = train_latent_vgg(folder, latents, num["latent_vgg"], seed, device)
    pixel_vgg = train_pixel_vgg(folder, len(latents), num["pixel_vgg"], seed, device)
    count = max(8, int(NUM_TRIPLETS * scale))
    networks = {
        "latent_vgg": (
            vgg,
            calibrate("calibrate_latent_vgg", folder, vgg, vae, count, seed, device),
        ),
        "pixel_vgg": (
            pixel_vgg,
            calibrate("calibrate_pixel_vgg", folder, pixel_vgg, None, count, seed, device),
        ),
    }
    denoiser = train_unet(folder, latents, num["unet"], seed, device)
    return publish(folder / "weights", vae, denoiser, clip, probe, networks)


def publish(
    folder: Path,
    vae: AutoencoderKL,
    denoiser: Denoiser,
    clip: CLIPModel,
    probe: models.Probe,
    networks: dict[str, tuple[VGG, list[Tensor]]],
) -> Path:
    """Writes the finished models as float16 safetensors, in the layout of the package's own `pocket/weights`."""
    words = models.tokenizer()
    for model in (vae, denoiser, clip, probe):
        model.to("cpu")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=words,
        unet=denoiser.unet,
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "teacher", safe_serialization=True)
    clip.half().save_pretrained(folder / "clip")
    words.save_pretrained(folder / "clip")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in probe.state_dict().items()}
    checkpoint.save(folder / "probe" / "model.safetensors", halves, {})
    note = "Heads calibrated on graded distortions of drawn scenes, not on human judgements."
    for name, (vgg, heads) in networks.items():
        LatentLPIPS(vgg.cpu(), heads).save_pretrained(folder / name, torch.float16, note)
    return folder
