"""`diffusion2gan pocket train`: trains every pocket model from scratch, stage by stage.

Run the same command again to resume. All training images are from world 0. More images (`--scale`)
on a faster machine (`--device cuda`, not tried yet) give better models with the same settings. The
shipped models were trained on as many images, but some of them came from an earlier version of the
world, and their learning rates were changed during training (docs/notes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from diffusion2gan.runtime import checkpoint, trainer
from diffusion2gan.runtime.cache import load_or_compute
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.transfer import to_device
from diffusion2gan.teacher.autoencoder import encode

Device = torch.device | str

WORLD = 0


@dataclass(frozen=True)
class Stage:
    """Training settings of one stage; an image counts in `num_images` each time it is used."""

    num_images: int
    batch_size: int
    peak_lr: float


STAGES = {
    "vae": Stage(num_images=44_000, batch_size=16, peak_lr=2e-3),
    "vae_crops": Stage(num_images=96_000, batch_size=16, peak_lr=2e-3),
    "clip": Stage(num_images=100_000, batch_size=128, peak_lr=1e-3),
    "probe": Stage(num_images=200_000, batch_size=32, peak_lr=2e-3),
    "latent_vgg": Stage(num_images=150_000, batch_size=32, peak_lr=1e-3),
    "pixel_vgg": Stage(num_images=64_000, batch_size=32, peak_lr=1e-3),
    "unet": Stage(num_images=540_000, batch_size=32, peak_lr=1e-3),
}
NUM_LATENTS = 65_536  # of training images, encoded once
LATENTS_PER_FILE = 4096
ENCODER_BATCH = 64
NUM_TRIPLETS = 1000  # per subset
CALIBRATION_LR = 1e-3  # ten times that of LPIPS, because there are far fewer triplets
CAPTION_DROP = 0.1
KL_WEIGHT = 3e-4  # per latent number, relative to errors per pixel


@dataclass(frozen=True)
class Run:
    """The folder and the settings of a training. `scale` multiplies the images per stage."""

    folder: Path
    seed: int = 0
    scale: float = 1.0
    device: Device = "cpu"

    def scaled(self, count: int, minimum: int) -> int:
        """`count` × `scale`, at least `minimum`."""
        return max(minimum, int(count * self.scale))

    def fit(self, name: str, module: nn.Module, loss: Callable[[range], Tensor]) -> None:
        """Trains `module` with the settings of stage `name`; see `trainer.fit`."""
        stage = STAGES[name]
        config = trainer.FitConfig(
            num_samples=self.scaled(stage.num_images, minimum=128),
            batch_size=stage.batch_size,
            peak_lr=stage.peak_lr,
            seed=self.seed,
        )
        trainer.fit(name, module, loss, config, self.folder)


def train(folder: Path, seed: int = 0, scale: float = 1.0, device: Device = "cpu") -> Path:
    """Runs every stage in order, then `publish`; returns the folder of the finished weights."""
    if isinstance(device, str):
        device = resolve_device(device, "give --device cpu")
    run = Run(folder, seed, scale, device)

    # 1. Autoencoder, evaluation models
    vae = train_vae(run)
    clip = train_clip(run)
    probe = train_probe(run)

    # 2. Perceptual networks
    latents = cache_latents(run, vae)
    latent_vgg = train_latent_vgg(run, latents)
    pixel_vgg = train_pixel_vgg(run, num_images=len(latents))
    num_triplets = run.scaled(NUM_TRIPLETS, minimum=8)
    latent_heads = calibrate(run, "calibrate_latent_vgg", latent_vgg, vae, num_triplets)
    pixel_heads = calibrate(run, "calibrate_pixel_vgg", pixel_vgg, None, num_triplets)
    networks = {"latent_vgg": (latent_vgg, latent_heads), "pixel_vgg": (pixel_vgg, pixel_heads)}

    # 3. Text encoder and denoiser
    denoiser = train_unet(run, latents)
    return publish(folder / "weights", vae, denoiser, clip, probe, networks)


def draw_images(indices: range, device: Device = "cpu") -> Tensor:
    """Training images, [B, 3, 64, 64] in [−1, 1]."""
    return to_device(scenes.draw(indices, WORLD).images, device)


# Stages "vae" and "vae_crops"


def train_vae(run: Run) -> AutoencoderKL:
    """Trains the autoencoder by `vae_loss`: on full images, then on 32×32 crops.

    After the first stage alone the VAE encodes brightness and only one axis of colour, since L1
    gives little weight to the hues of small objects. The second stage adds the squared error, and
    shuffles the colour channels of half of the crops.
    """
    torch.manual_seed(run.seed)
    vae = models.vae().to(run.device)

    # 1. Full images
    def full_image_loss(numbers: range) -> Tensor:
        return vae_loss(vae, draw_images(numbers, run.device), mse_weight=0.0)

    run.fit("vae", vae, full_image_loss)

    # 2. Crops
    def crop_loss(numbers: range) -> Tensor:
        return vae_loss(vae, to_device(draw_crops(numbers), run.device), mse_weight=4.0)

    vae.requires_grad_(True)
    run.fit("vae_crops", vae, crop_loss)

    # 3. Scale latents to a standard deviation of 1, measured on other images
    measured = draw_images(range(10**6, 10**6 + 512), run.device)
    with torch.no_grad():
        std = vae.encode(measured).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 4))
    return vae


def vae_loss(vae: AutoencoderKL, images: Tensor, mse_weight: float) -> Tensor:
    """Reconstruction and KL loss of `images` [B, 3, H, W].

    L1 of the pixels, L1 of their vertical and horizontal differences (edges), squared error, and
    the KL divergence from N(0, I).
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample

    # Keep the order of these operations: it is the order in which gradients are summed.
    vertical_edges = F.l1_loss(decoded.diff(dim=2), images.diff(dim=2))
    horizontal_edges = F.l1_loss(decoded.diff(dim=3), images.diff(dim=3))
    edges = vertical_edges + horizontal_edges
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    l1 = F.l1_loss(decoded, images)
    mse = F.mse_loss(decoded, images)
    return l1 + edges + mse_weight * mse + KL_WEIGHT * kl


def draw_crops(numbers: range, size: int = 32) -> Tensor:
    """A random crop of each training image; every second one has its channels permuted."""
    crops = []
    for i, image in enumerate(draw_images(numbers)):
        top, left = torch.randint(0, image.shape[1] - size + 1, (2,)).tolist()
        crop = image[:, top : top + size, left : left + size]
        if i % 2 == 1:
            crop = crop[torch.randperm(3)]
        crops.append(crop)
    return torch.stack(crops)


# Stage "clip"


def train_clip(run: Run) -> CLIPModel:
    """Trains CLIP on images and captions by the symmetric contrastive loss (Radford et al. 2021).

    Each image is classified among the captions of its batch, and each caption among the images.
    """
    torch.manual_seed(run.seed)
    tokenizer = models.tokenizer()
    clip = models.clip(len(tokenizer)).to(run.device)

    def loss(numbers: range) -> Tensor:
        batch = scenes.draw(numbers, WORLD)
        output = clip(
            input_ids=token_ids(tokenizer, batch.captions, run.device),
            pixel_values=to_device(batch.images, run.device),
        )
        logits = output.logits_per_image  # [images, captions]
        matching = torch.arange(len(numbers), device=run.device)
        image_loss = F.cross_entropy(logits, matching)
        caption_loss = F.cross_entropy(logits.T, matching)
        return 0.5 * (image_loss + caption_loss)

    run.fit("clip", clip, loss)
    return clip


def token_ids(tokenizer: CLIPTokenizer, captions: list[str], device: Device) -> Tensor:
    """[B, MAX_LENGTH] int64."""
    ids = tokenizer(
        captions, padding="max_length", max_length=models.MAX_LENGTH, return_tensors="pt"
    ).input_ids
    return to_device(torch.as_tensor(ids), device)


# Stage "probe"


def train_probe(run: Run) -> models.Probe:
    """Trains the probe to classify the attributes of noisy images by `attribute_loss`."""
    torch.manual_seed(run.seed)
    probe = models.Probe().to(run.device)

    def loss(numbers: range) -> Tensor:
        batch = scenes.draw(numbers, WORLD)
        noise_level = 0.06 * torch.rand(len(numbers), 1, 1, 1)
        images = batch.images + noise_level * torch.randn_like(batch.images)
        return attribute_loss(probe(to_device(images, run.device)), attribute_targets(batch))

    run.fit("probe", probe, loss)
    return probe


def attribute_targets(batch: scenes.Scenes) -> dict[str, Tensor]:
    """The targets of each image for `models.ATTRIBUTES`.

    Class numbers [B] for count and ground, 0/1 tables [B, classes] for the others.
    """
    batch_size = len(batch.count)
    targets = {"count": batch.count - 1, "ground": batch.ground}
    for name, num_classes in models.ATTRIBUTES.items():
        if name not in models.SINGLE_CLASS:
            targets[name] = torch.zeros(batch_size, num_classes)

    for k in range(3):
        # Images that have a k-th object, and its labels
        rows = (batch.shape[:, k] >= 0).nonzero()[:, 0]
        shape = batch.shape[rows, k]
        colour = batch.colour[rows, k]
        pattern = batch.pattern[rows, k]
        targets["shape"][rows, shape] = 1
        targets["colour"][rows, colour] = 1
        targets["pattern"][rows, pattern] = 1

        # Combinations are numbered shape by shape
        shape_colour = shape * len(scenes.COLOURS) + colour
        shape_pattern = shape * len(scenes.PATTERNS) + pattern
        targets["shape_colour"][rows, shape_colour] = 1
        targets["shape_pattern"][rows, shape_pattern] = 1
    return targets


def attribute_loss(logits: Tensor, targets: dict[str, Tensor]) -> Tensor:
    """The mean over images of the losses of all attributes.

    Cross-entropy for count and ground; for the others the binary cross-entropy, summed over
    classes. `logits` [B, ΣATTRIBUTES].
    """
    predicted = models.split_logits(logits)
    targets = {name: to_device(target, logits.device) for name, target in targets.items()}

    count_loss = F.cross_entropy(predicted["count"], targets["count"])
    ground_loss = F.cross_entropy(predicted["ground"], targets["ground"])
    loss = count_loss + ground_loss
    for name in ("shape", "colour", "pattern", "shape_colour", "shape_pattern"):
        per_class = F.binary_cross_entropy_with_logits(
            predicted[name], targets[name], reduction="none"
        )
        loss = loss + per_class.sum(1).mean()
    return loss


# Stages "latent_vgg" and "pixel_vgg", and their calibration


def encode_images(run: Run, vae: AutoencoderKL, indices: range) -> dict[str, Tensor]:
    """Posterior means × scaling_factor of these training images: [N, C, h, w] float16."""
    means = []
    for start in range(indices.start, indices.stop, ENCODER_BATCH):
        batch = range(start, min(start + ENCODER_BATCH, indices.stop))
        means.append(vae.encode(draw_images(batch, run.device)).latent_dist.mean)
    return {"latents": (torch.cat(means) * vae.config.scaling_factor).half()}


@torch.no_grad()
def cache_latents(run: Run, vae: AutoencoderKL) -> Tensor:
    """Encodes the training images 0 … count−1 once: [count, C, h, w] float16.

    Posterior means × scaling_factor, stored in `folder/latents`.
    """
    count = run.scaled(NUM_LATENTS, minimum=128)
    files = []
    with Bar("latents", count) as bar:
        for start in range(0, count, LATENTS_PER_FILE):
            indices = range(start, min(start + LATENTS_PER_FILE, count))
            name = f"{start:07d}"
            if len(indices) < LATENTS_PER_FILE:
                name += f"-{len(indices)}"  # a run with a larger scale has more
            path = run.folder / "latents" / f"{name}.safetensors"
            tensors = load_or_compute(path, {}, partial(encode_images, run, vae, indices))
            files.append(tensors["latents"])
            bar.advance(len(indices))

    return torch.cat(files).to(run.device)


def select_rows(latents: Tensor, rows: list[int]) -> Tensor:
    return latents[to_device(torch.tensor(rows), latents.device)]


def train_latent_vgg(run: Run, latents: Tensor) -> VGG:
    """Trains the feature network of LatentLPIPS to classify attributes from `latents`."""

    def inputs(batch: scenes.Scenes, rows: list[int]) -> Tensor:
        return select_rows(latents, rows).float()

    torch.manual_seed(run.seed)
    return _train_vgg(run, "latent_vgg", models.latent_vgg(), inputs, len(latents))


def train_pixel_vgg(run: Run, num_images: int) -> VGG:
    """Trains the feature network of PixelLPIPS to classify attributes from the same images."""

    def inputs(batch: scenes.Scenes, rows: list[int]) -> Tensor:
        return to_device(batch.images, run.device)

    torch.manual_seed(run.seed)
    return _train_vgg(run, "pixel_vgg", models.pixel_vgg(), inputs, num_images)


def _train_vgg(
    run: Run,
    stage: str,
    vgg: VGG,
    inputs: Callable[[scenes.Scenes, list[int]], Tensor],
    num_images: int,
) -> VGG:
    """Trains `vgg` and an attribute head by `attribute_loss`; returns `vgg` without the head.

    `inputs(scenes, rows)` returns the network's inputs for the images `rows`; after the first
    `num_images`, the images repeat.
    """
    head = models.AttributeHead(vgg.config["widths"][-1])
    classifier = nn.ModuleDict({"vgg": vgg, "head": head}).to(run.device)

    def loss(numbers: range) -> Tensor:
        rows = [number % num_images for number in numbers]
        batch = scenes.draw(rows, WORLD)
        last_map = vgg(inputs(batch, rows))[-1]
        return attribute_loss(head(last_map), attribute_targets(batch))

    run.fit(stage, classifier, loss)
    return vgg


def calibrate(
    run: Run, stage: str, vgg: VGG, vae: AutoencoderKL | None, num_triplets: int
) -> list[Tensor]:
    """Fits the heads of a network to `num_triplets` graded distortions of scenes per subset.

    The judgements follow from the grades; they are not human judgements. `vae` is that of a network
    on latents, None for one on pixels.
    """
    heads = [torch.ones(width) for width in vgg.config["widths"]]
    judged = compute_differences(vgg, vae, num_triplets, run.seed, run.device)
    return calibrate_heads(
        judged, heads, folder=run.folder, stage=stage, peak_lr=CALIBRATION_LR, seed=run.seed
    )


@torch.no_grad()
def compute_differences(
    vgg: VGG, vae: AutoencoderKL | None, num_triplets: int, seed: int, device: Device = "cpu"
) -> JudgedDifferences:
    """The differences of `num_triplets` triplets per subset; with `vae`, of their latents."""
    heads = [torch.ones(width) for width in vgg.config["widths"]]
    distance = LatentLPIPS(vgg, heads)
    d0s, d1s, judgements = [], [], []
    with Bar("triplets", num_triplets * len(triplets.SUBSETS)) as bar:
        for subset in triplets.SUBSETS:
            for number in range(num_triplets):
                # The network's inputs
                triplet = triplets.make_triplet(number, subset, seed)
                images = torch.stack([triplet.p0, triplet.p1, triplet.ref])
                inputs = to_device(images, device)
                if vae is not None:
                    inputs = encode(vae, inputs)
                p0, p1, ref = inputs.chunk(3)

                # The differences of all layers, concatenated
                d0 = torch.cat(distance.differences(p0, ref), 1)
                d1 = torch.cat(distance.differences(p1, ref), 1)
                d0s.append(d0)
                d1s.append(d1)
                judgements.append(triplet.judge)
                bar.advance(1)

    return JudgedDifferences(torch.cat(d0s).cpu(), torch.cat(d1s).cpu(), torch.tensor(judgements))


# Stage "unet"


class Denoiser(nn.Module):
    """The text encoder and the UNet, which are trained together."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = models.text_encoder(vocab_size)
        self.unet = models.unet()


def train_unet(run: Run, latents: Tensor) -> Denoiser:
    """Trains the denoiser by v-prediction (Salimans & Ho 2022, eq. 14).

    Mean squared error of v = √ᾱ·ε − √(1−ᾱ)·x0 at the timesteps of `draw_timesteps`. One caption in
    ten is dropped, as classifier-free guidance needs an unconditional prediction.
    """
    torch.manual_seed(run.seed)
    tokenizer = models.tokenizer()
    scheduler = models.scheduler()
    denoiser = Denoiser(len(tokenizer)).to(run.device)

    def loss(numbers: range) -> Tensor:
        rows = [number % len(latents) for number in numbers]
        x0 = select_rows(latents, rows).float()

        # Captions, some of them dropped
        captions = scenes.captions(rows, WORLD)
        is_kept = torch.rand(len(rows)) >= CAPTION_DROP
        for i in range(len(rows)):
            if not is_kept[i]:
                captions[i] = ""
        ids = token_ids(tokenizer, captions, run.device)
        embeds = denoiser.text_encoder(ids).last_hidden_state

        # Noisy latents and the loss
        timesteps = to_device(draw_timesteps(len(rows)), run.device)
        noise = torch.randn_like(x0)
        x_t = scheduler.add_noise(x0, noise, timesteps)
        v = scheduler.get_velocity(x0, noise, timesteps)
        return F.mse_loss(denoiser.unet(x_t, timesteps, embeds).sample, v)

    run.fit("unet", denoiser, loss)
    return denoiser


def draw_timesteps(size: int) -> Tensor:
    """[size] int64 in 0 … 999, logit-normal (Esser et al. 2024, eq. 19), mean −0.8, std 1.2.

    Half are below 310 and a fifth above 560: outlines and patterns are decided in that range.
    Uniform timesteps would use almost half of the images above 560, where latents this small are
    almost pure noise.
    """
    normal = 1.2 * torch.randn(size) - 0.8
    timesteps = 1000 * torch.sigmoid(normal)
    return timesteps.long().clamp(0, 999)


# The finished models


def publish(
    folder: Path,
    vae: AutoencoderKL,
    denoiser: Denoiser,
    clip: CLIPModel,
    probe: models.Probe,
    networks: dict[str, tuple[VGG, list[Tensor]]],
) -> Path:
    """Writes the finished models as float16 safetensors, in the layout of `pocket/weights`.

    `networks`: the network and heads per folder name. Returns `folder`.
    """
    for model in (vae, denoiser, clip, probe):
        model.to("cpu")

    # Teacher pipeline
    tokenizer = models.tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "teacher", safe_serialization=True)

    # Evaluation models
    clip.half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    probe_state = probe.state_dict()
    for key, value in probe_state.items():
        if value.is_floating_point():
            probe_state[key] = value.half()
    checkpoint.save(folder / "probe" / "model.safetensors", probe_state, {})

    # Perceptual networks
    note = "Heads calibrated on graded distortions of drawn scenes, not on human judgements."
    for name, (vgg, heads) in networks.items():
        LatentLPIPS(vgg.cpu(), heads).save_pretrained(folder / name, torch.float16, note)
    return folder
