"""`diffusion2gan perceptual fit`: trains a feature network for any VAE to classify its latents.

Run the same command again to resume. Under torchrun the ranks share the encoding and each batch.

Diffusion2GAN (Kang et al. 2024, section 3.2) trains VGG-16 with batch norm on the latents of
ImageNet; this command accepts any labelled images. The classifier is one linear layer on the mean
of the last feature map; the paper does not publish its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import NO_TRANSFORMS, TransformSettings, apply_transform
from diffusion2gan.perceptual.checks import check_size
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.images import (
    LabelledImages,
    check_classes,
    held_out_mask,
    images_from_uint8,
    open_labelled_images,
    read_image,
)
from diffusion2gan.perceptual.vgg import STAGES, VGG, num_dropped_pools
from diffusion2gan.runtime import trainer
from diffusion2gan.runtime.cache import Cache, Rows, ensure_settings, make_cache
from diffusion2gan.runtime.distributed import Group, connect_ranks, get_ranks, resolve_device
from diffusion2gan.runtime.files import write_json
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.transfer import to_device
from diffusion2gan.teacher.autoencoder import (
    encode,
    load_vae,
    num_latent_channels,
    spatial_factor,
    vae_revision,
)


@dataclass(frozen=True)
class FitSettings:
    """`widths`: channels of the five stages. `size`: the images' side in pixels.

    `transforms`: random transforms of the network's inputs in training, none by default.
    """

    widths: tuple[int, ...]
    size: int = 256
    epochs: int = 30
    batch_size: int = 64
    peak_lr: float = 1e-3
    seed: int = 0
    transforms: TransformSettings = NO_TRANSFORMS


class Classifier(nn.Module):
    """The network and a linear layer on the mean of its last map: x → logits [B, num_classes]."""

    def __init__(self, vgg: VGG, num_classes: int) -> None:
        super().__init__()
        self.vgg = vgg
        self.head = nn.Linear(vgg.config["widths"][-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        last_map = self.vgg(x)[-1]
        return self.head(last_map.mean((2, 3)))


def fit(
    images: Path, out: Path, vae: str | None, settings: FitSettings, device: str = "cpu"
) -> dict[str, Any] | None:
    """Trains on nine tenths of `images`, measures top-1 on the others, writes the network to `out`.

    `vae`: its folder or `pocket`; None fits a network on pixels. All head weights of the network
    are 1: the next step is `perceptual calibrate`. Returns the contents of fit.json.

    Under torchrun all ranks train one network, each on its rows of every batch; all but the main
    rank return None. Batch norm normalises by the rows of one rank, so the network depends slightly
    on the number of ranks.

    The state of an interrupted run is in `out/work`, which is not needed once the network is
    written. Raises UserError as `open_labelled_images` and `make_cache` do.
    """
    # 1. Open the images and the VAE; create the network
    ranks = get_ranks()
    torch_device = resolve_device(device, "give --device cpu")
    check_settings(settings, ranks.world_size)
    work = out / "work"
    labelled = open_labelled_images(images)
    encoder = None if vae is None else load_vae(vae, torch_device)
    vgg = build_vgg(encoder, settings)

    with exclusive_lock(out / "model.safetensors") if ranks.is_main else nullcontext():
        with connect_ranks(torch_device) as group:
            # 2. Encode every image once
            spec = {
                "images": labelled.digest,
                "size": settings.size,
                "vae": None if vae is None else vae_revision(vae),
            }
            cache = cache_inputs(work, labelled, spec, encoder, torch_device, group)
            ensure_settings(
                work / "settings.json",
                {
                    "widths": list(settings.widths),
                    "epochs": settings.epochs,
                    "batch_size": settings.batch_size,
                    "peak_lr": settings.peak_lr,
                    "seed": settings.seed,
                    "transforms": settings.transforms.describe(),
                },
            )

            # 3. Hold out a tenth of each class
            labels = cache.load_all("label")
            check_classes(labelled.classes, labels.tolist(), images)
            held_out = held_out_mask(labels, settings.seed)
            train_rows = (~held_out).nonzero()[:, 0]

            # 4. Train. Seed again: ranks may have used random numbers differently while encoding,
            # and must start from the same classifier.
            torch.manual_seed(settings.seed + 1)
            classifier = Classifier(vgg, len(labelled.classes)).to(torch_device)

            def loss(numbers: range) -> Tensor:
                order = trainer.shuffled(numbers, len(train_rows), settings.seed)
                rows = train_rows[order].tolist()
                inputs = to_device(decode_inputs(cache.load_rows("input", rows)), torch_device)
                # Without a generator of its own, T depends on the step's seed
                transform = settings.transforms.draw(len(rows), None, torch_device)
                inputs = apply_transform(inputs, transform, settings.transforms.resampling)
                return F.cross_entropy(classifier(inputs), to_device(labels[rows], torch_device))

            config = trainer.FitConfig(
                num_samples=settings.epochs * len(train_rows),
                batch_size=settings.batch_size,
                peak_lr=settings.peak_lr,
                seed=settings.seed,
            )
            trainer.fit("fit", classifier, loss, config, work, group=group)

        if not ranks.is_main:
            return None

        # 5. Measure on the held-out images
        held_out_rows = held_out.nonzero()[:, 0].tolist()
        result = {
            "top1": measure_top1(classifier, cache, labels, held_out_rows, torch_device),
            "held_out": len(held_out_rows),
            "trained_on": len(train_rows),
            "classes": len(labelled.classes),
            "unreadable": cache.unreadable,
            "epochs": settings.epochs,
            "seed": settings.seed,
            "transforms": settings.transforms.describe(),
            "size": settings.size,
            "vae": "none: pixels" if vae is None else Path(vae).name,
        }

        # 6. Write the network
        heads = [torch.ones(width) for width in settings.widths]
        note = (
            f"Trained to classify {len(labelled.classes)} classes: top-1 {result['top1']:.1%} on "
            f"{result['held_out']} held-out images. Its heads are all one: not calibrated."
        )
        LatentLPIPS(vgg.cpu(), heads).save_pretrained(out, note=note)
        write_json(out / "fit.json", result)
        return result


def check_settings(settings: FitSettings, world_size: int) -> None:
    """Raises UserError for a wrong number of widths or a batch that the ranks cannot share."""
    if len(settings.widths) != len(STAGES):
        widths = ",".join(map(str, settings.widths))
        raise UserError(
            f"--widths {widths}: {len(settings.widths)} numbers, but five are needed, one per stage"
        )

    batch_size = settings.batch_size
    if batch_size % world_size != 0 or batch_size < 2 * world_size:
        message = f"--batch-size {batch_size}: batch norm needs at least 2 images"
        if world_size > 1:
            message += (
                f" on each of the {world_size} ranks, and the same number on all; "
                f"give a multiple of {world_size}, {2 * world_size} or more"
            )
        raise UserError(message)


def build_vgg(encoder: nn.Module | None, settings: FitSettings) -> VGG:
    """A randomly initialised network for the latents of `encoder`, a VAE; for pixels if None.

    Raises UserError if the images' size does not fit it.
    """
    channels = 3
    factor = 1
    if encoder is not None:
        channels = num_latent_channels(encoder)
        factor = spatial_factor(encoder)
    torch.manual_seed(settings.seed)
    vgg = VGG(channels, settings.widths, num_dropped_pools(factor))
    check_size(settings.size, factor, vgg.smallest_side)
    return vgg


def cache_inputs(
    folder: Path,
    labelled: LabelledImages,
    spec: dict[str, Any],
    encoder: nn.Module | None,
    device: torch.device,
    group: Group,
) -> Cache:
    """Computes in `folder`, per image, the network's `input` and the `label`.

    An input is float16 latents [C, h, w] with `encoder`, a VAE, and uint8 pixels [3, H, W] without.
    `spec` identifies the inputs, see `make_cache`. Ranks share the work.
    """
    size = spec["size"]

    def read(i: int) -> Rows:
        image = read_image(labelled.source(i), labelled.names[i], size)
        return {"input": image, "label": torch.tensor(labelled.labels[i])}

    def compute(rows: Rows) -> Rows:
        if encoder is None:
            return rows
        latents = encode(encoder, to_device(images_from_uint8(rows["input"]), device))
        return {"input": latents.half().cpu(), "label": rows["label"]}

    return make_cache(folder, spec, len(labelled.names), read, compute, "images", group=group)


def decode_inputs(rows: Tensor) -> Tensor:
    """Cached inputs as the network reads them: latents, or images in [−1, 1], float32."""
    if rows.dtype == torch.uint8:
        return images_from_uint8(rows)
    return rows.float()


@torch.no_grad()
def measure_top1(
    classifier: Classifier,
    cache: Cache,
    labels: Tensor,
    rows: list[int],
    device: torch.device,
    batch_size: int = 256,
) -> float:
    """The share of `rows` that the classifier labels correctly."""
    num_correct = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = to_device(decode_inputs(cache.load_rows("input", batch)), device)
        predicted = classifier(inputs).argmax(1)
        num_correct += (predicted == to_device(labels[batch], device)).sum()
    return int(num_correct) / len(rows)
