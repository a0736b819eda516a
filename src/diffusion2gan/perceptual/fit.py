"""`diffusion2gan perceptual fit`: a network for any VAE, trained to classify its latents. Run it again to go on.

Under torchrun the ranks share the encoding and each batch.

Diffusion2GAN (Kang et al. 2024, section 3.2) trains VGG-16 with batch norm on ImageNet's latents; any labelled pictures
do here. The classifier is one linear layer on the mean of the last map (the paper's is not published; ours).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.checks import check_size
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.images import (
    Labelled,
    check_classes,
    held_out,
    open_labelled,
    read_picture,
    to_images,
)
from diffusion2gan.perceptual.vgg import STAGES, VGG, num_dropped_pools
from diffusion2gan.runtime.cache import Cache, Rows, ensure_settings, make_cache
from diffusion2gan.runtime.distributed import Group, connect_ranks, get_ranks, resolve_device
from diffusion2gan.runtime.files import write_json
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.trainer import FitConfig, shuffled
from diffusion2gan.runtime.trainer import fit as fit_module
from diffusion2gan.teacher.autoencoder import (
    encode,
    load_vae,
    num_latent_channels,
    spatial_factor,
    vae_revision,
)


class Classifier(nn.Module):
    """`vgg`'s last map → logits [B, num_classes]."""

    def __init__(self, vgg: VGG, num_classes: int) -> None:
        super().__init__()
        self.vgg, self.head = vgg, nn.Linear(vgg.config["widths"][-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.vgg(x)[-1].mean((2, 3)))


def fit(
    images: Path,
    out: Path,
    vae: str | None,
    widths: tuple[int, ...],
    size: int = 256,
    epochs: int = 30,
    batch_size: int = 64,
    peak_lr: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any] | None:
    """Trains on nine tenths of `images`, measures on the rest, writes the network to `out`; returns what it measured.

    Under torchrun all ranks train one network, each on its rows of a batch (batch norm sees those alone, so the network
    depends a little on how many there are), and all but the first return nothing.

    `vae`: its folder or `pocket`; None fits the pixel twin. `size`: the pictures' side. The heads written are all one:
    `perceptual calibrate` is next. What it goes on from lies in `out/work`, which nobody needs once the network is
    there. Raises UserError at what `open_labelled` and `make_cache` refuse.
    """
    here, place = get_ranks(), resolve_device(device, "give --device cpu")
    if len(widths) != len(STAGES):
        raise UserError(
            f"--widths {','.join(map(str, widths))}: {len(widths)} numbers, five are needed, one a stage"
        )
    if batch_size % here.world_size or batch_size < 2 * here.world_size:
        raise UserError(
            f"--batch-size {batch_size}: batch norm needs 2 pictures or more at once"
            + f", and each of {here.world_size} ranks as many; give a multiple of {here.world_size}"
            * (here.world_size > 1)
        )
    work, labelled = out / "work", open_labelled(images)
    settings = {
        "widths": list(widths),
        "epochs": epochs,
        "batch_size": batch_size,
        "peak_lr": peak_lr,
        "seed": seed,
    }
    vgg, make = inputs_of(labelled, vae, size, widths, seed, place)
    with exclusive_lock(out / "model.safetensors") if here.is_main else nullcontext():
        with connect_ranks(place) as group:
            cache = make(work, group)
            ensure_settings(work / "settings.json", settings)
            labels = cache.load_all("label")
            check_classes(labelled.classes, labels.tolist(), images)
            mask = held_out(labels, seed)
            training = (~mask).nonzero()[:, 0]
            torch.manual_seed(seed + 1)  # the same head on every rank, whoever encoded what
            classifier = Classifier(vgg, len(labelled.classes)).to(place)

            def loss(numbers: range) -> Tensor:
                places = training[shuffled(numbers, len(training), seed)].tolist()
                inputs = to_inputs(cache.load_rows("input", places)).to(place)
                return F.cross_entropy(classifier(inputs), labels[places].to(place))

            fit_module(
                "fit",
                classifier,
                loss,
                FitConfig(epochs * len(training), batch_size, peak_lr, seed),
                work,
                group=group,
            )
        if not here.is_main:
            return None
        result = {
            "top1": top1(classifier, cache, labels, mask.nonzero()[:, 0].tolist(), place),
            "held_out": int(mask.sum()),
            "trained_on": len(training),
            "classes": len(labelled.classes),
            "unreadable": cache.unreadable,
            "epochs": epochs,
            "seed": seed,
            "size": size,
            "vae": "none: pixels" if vae is None else Path(vae).name,
        }
        heads = [torch.ones(width) for width in widths]
        note = (
            f"Trained to classify {len(labelled.classes)} classes: top-1 {result['top1']:.1%} on {result['held_out']} "
            "held-out pictures. Its heads are all one: not calibrated."
        )
        LatentLPIPS(vgg.cpu(), heads).save_pretrained(out, note=note)
        write_json(out / "fit.json", result)
        return result


def inputs_of(
    labelled: Labelled,
    vae: str | None,
    size: int,
    widths: tuple[int, ...],
    seed: int,
    device: torch.device,
) -> tuple[VGG, Callable[[Path, Group], Cache]]:
    """A fresh network, and what makes in a folder the rows it reads: `input`, float16 latents or uint8, and `label`."""
    spec: dict[str, Any] = {"images": labelled.digest, "size": size, "vae": None}
    network, factor, channels = None, 1, 3
    if vae is not None:
        network = load_vae(vae, device)
        factor, channels = spatial_factor(network), num_latent_channels(network)
        spec["vae"] = vae_revision(vae)
    torch.manual_seed(seed)
    vgg = VGG(channels, widths, num_dropped_pools(factor))
    check_size(size, factor, vgg.smallest_side)

    def read(i: int) -> Rows:
        picture = read_picture(labelled.source(i), labelled.names[i], size)
        return {"input": picture, "label": torch.tensor(labelled.labels[i])}

    def finish(rows: Rows) -> Rows:
        if network is None:
            return rows
        return rows | {"input": encode(network, to_images(rows["input"]).to(device)).half().cpu()}

    def make(folder: Path, group: Group) -> Cache:
        return make_cache(folder, spec, len(labelled.names), read, finish, "pictures", group=group)

    return vgg, make


def to_inputs(rows: Tensor) -> Tensor:
    """Cached rows → what the network reads, float32."""
    return to_images(rows) if rows.dtype == torch.uint8 else rows.float()


@torch.no_grad()
def top1(
    classifier: Classifier,
    cache: Cache,
    labels: Tensor,
    places: list[int],
    device: torch.device,
    batch: int = 256,
) -> float:
    """Share of `places` that the classifier gets right."""
    right = 0
    for start in range(0, len(places), batch):
        here = places[start : start + batch]
        guesses = classifier(to_inputs(cache.load_rows("input", here)).to(device)).argmax(1).cpu()
        right += int((guesses == labels[here]).sum())
    return right / len(places)
