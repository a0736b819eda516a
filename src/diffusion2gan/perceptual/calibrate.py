"""`diffusion2gan perceptual calibrate`: fits a network's heads to two-alternative forced choices.

Run the same command again to resume.

The network is frozen and the distance is linear in its heads, so each triplet passes through the
network only once: its `channel_differences`, ΣC numbers per distance, are cached on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import NO_TRANSFORMS, TransformSettings, apply_transform
from diffusion2gan.perceptual.checks import check_size
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.images import held_out_mask, images_from_uint8
from diffusion2gan.perceptual.ranking import JudgedDifferences, calibrate_heads, two_afc
from diffusion2gan.perceptual.triplets import Triplets, open_triplets, read_triplet
from diffusion2gan.perceptual.weights import load_network, network_revision
from diffusion2gan.runtime.cache import Cache, Rows, ensure_settings, make_cache
from diffusion2gan.runtime.distributed import require_single_process, resolve_device
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
class CalibrationSettings:
    """`size`: the side that the triplets' images are resized to, in pixels.

    `transforms`: one random transform per triplet of the network's inputs, none by default.
    """

    size: int = 64
    epochs: int = 10
    peak_lr: float = 1e-4
    seed: int = 0
    transforms: TransformSettings = NO_TRANSFORMS


def calibrate(
    triplets: Path,
    network: str,
    out: Path,
    vae: str | None = None,
    scored: Path | None = None,
    settings: CalibrationSettings | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Fits the heads of `network` to `triplets` and writes the calibrated network to `out`.

    Returns, per subset, the number of scored triplets and their 2AFC score before and after. The
    scored triplets are those in `scored`, or by default a held-out tenth of each subset. `vae`
    encodes images to the latents that the network reads; None for a network on pixels.

    The state of an interrupted run is in `out/work`, which is not needed once the network is
    written.
    """
    if settings is None:
        settings = CalibrationSettings()
    require_single_process("perceptual calibrate")
    torch_device = resolve_device(device, "give --device cpu")
    work = out / "work"

    # 1. Open the network, the triplets and the VAE, and check that they fit each other
    vgg, heads, formula = load_network(network, "pixel_vgg" if vae is None else "latent_vgg")
    distance = LatentLPIPS(vgg, heads, **formula).to(torch_device)
    train_triplets = open_triplets(triplets)
    score_triplets = train_triplets if scored is None else open_triplets(scored)
    encoder = None if vae is None else load_vae(vae, torch_device)
    check_network(network, distance, encoder, vae, settings.size)

    def cache_of_triplets(folder: Path, opened: Triplets) -> Cache:
        spec = {
            "triplets": opened.digest,
            "subsets": opened.subsets,
            "size": settings.size,
            "network": network_revision(network),
            "vae": None if vae is None else vae_revision(vae),
            "transforms": None,
        }
        if settings.transforms.families:
            spec["transforms"] = {"seed": settings.seed, **(settings.transforms.describe() or {})}
        return cache_differences(folder, opened, spec, distance, encoder, settings, torch_device)

    with exclusive_lock(out / "model.safetensors"):
        # 2. Run every triplet through the network
        cache = cache_of_triplets(work, train_triplets)
        ensure_settings(
            work / "settings.json",
            {
                "epochs": settings.epochs,
                "peak_lr": settings.peak_lr,
                "seed": settings.seed,
                "scored": str(scored),
            },
        )
        judged, subset = load_differences(cache)

        # 3. Hold out a tenth of each subset, unless other triplets are scored
        held_out = torch.zeros(len(subset), dtype=torch.bool)
        if scored is None:
            held_out = held_out_mask(subset, settings.seed)
            check_held_out(train_triplets, subset[held_out])

        # 4. Fit the heads
        new_heads = calibrate_heads(
            judged.select(~held_out),
            heads,
            folder=work,
            epochs=settings.epochs,
            peak_lr=settings.peak_lr,
            seed=settings.seed,
        )

        # 5. Score each subset with the old and the new heads
        if scored is None:
            judged = judged.select(held_out)
            subset = subset[held_out]
        else:
            score_cache = cache_of_triplets(work / "scored", score_triplets)
            judged, subset = load_differences(score_cache)
        result = {}
        for number, name in enumerate(score_triplets.subsets):
            result[name] = score_heads(judged.select(subset == number), heads, new_heads)

        # 6. Write the network and its scores
        scores = []
        for name, score in result.items():
            scores.append(f"{name} {score['after']:.1%} (before: {score['before']:.1%})")
        note = f"Heads calibrated. 2AFC score: {'; '.join(scores)}."
        LatentLPIPS(vgg.cpu(), new_heads, **formula).save_pretrained(out, note=note)
        write_json(out / "calibrate.json", result)
        return result


def check_network(
    network: str, distance: LatentLPIPS, encoder: nn.Module | None, vae: str | None, size: int
) -> None:
    """Raises UserError if the VAE or the images' `size` does not fit the network."""
    channels = 3
    factor = 1
    inputs = "the inputs are images (no --vae)"
    if encoder is not None:
        channels = num_latent_channels(encoder)
        factor = spatial_factor(encoder)
        inputs = f"the inputs are latents of {vae}"
    if channels != distance.channels:
        raise UserError(
            f"the network in {network} reads {distance.channels} channels, but {inputs} with "
            f"{channels} channels. Name the VAE it was fitted to with --vae."
        )
    check_size(size, factor, distance.smallest_side)


def cache_differences(
    folder: Path,
    triplets: Triplets,
    spec: dict[str, Any],
    distance: LatentLPIPS,
    encoder: nn.Module | None,
    settings: CalibrationSettings,
    device: torch.device,
) -> Cache:
    """Computes in `folder`, per triplet, `d0` and `d1` [ΣC] float32, `judge` and `subset`.

    `encoder` is the VAE of a network on latents. `spec` identifies the inputs, see `make_cache`.
    `settings` has the images' size and the transforms.
    """
    # One transform per triplet, the same for its three inputs
    generator = torch.Generator().manual_seed(settings.seed)
    transforms = settings.transforms.draw(len(triplets.refs), generator, device)

    def read(i: int) -> Rows:
        return read_triplet(triplets, i, settings.size) | {"number": torch.tensor(i)}

    def to_input(pixels: Tensor) -> Tensor:
        images = to_device(images_from_uint8(pixels), device)
        return images if encoder is None else encode(encoder, images)

    @torch.no_grad()
    def compute(rows: Rows) -> Rows:
        transform = transforms.select(to_device(rows["number"], device))
        inputs = []
        for name in ("ref", "p0", "p1"):
            untransformed = to_input(rows[name])
            inputs.append(apply_transform(untransformed, transform, settings.transforms.resampling))
        ref, p0, p1 = inputs
        d0 = torch.cat(distance.differences(p0, ref), 1)
        d1 = torch.cat(distance.differences(p1, ref), 1)
        d0, d1 = torch.stack([d0, d1]).cpu()
        return {
            "d0": d0.clone(),
            "d1": d1.clone(),
            "judge": rows["judge"],
            "subset": rows["subset"],
        }

    return make_cache(folder, spec, len(triplets.refs), read, compute, "triplets")


def load_differences(cache: Cache) -> tuple[JudgedDifferences, Tensor]:
    """(all triplets of `cache`, the index of each triplet's subset [N])."""
    judged = JudgedDifferences(cache.load_all("d0"), cache.load_all("d1"), cache.load_all("judge"))
    return judged, cache.load_all("subset")


def check_held_out(triplets: Triplets, held_out_subset: Tensor) -> None:
    """Raises UserError if a subset has no held-out triplet to score."""
    for number, name in enumerate(triplets.subsets):
        if not (held_out_subset == number).any():
            raise UserError(
                f"subset {name!r} in {triplets.folder} is too small to hold out a triplet; "
                "name triplets to score with --scored"
            )


def score_heads(
    judged: JudgedDifferences, before: list[Tensor], after: list[Tensor]
) -> dict[str, Any]:
    """The 2AFC score of `judged` with the heads `before` and `after`, and the count."""
    result: dict[str, Any] = {"count": len(judged)}
    for name, heads in (("before", before), ("after", after)):
        flat_heads = torch.cat(heads).cpu()
        result[name] = two_afc(judged.d0 @ flat_heads, judged.d1 @ flat_heads, judged.judge)
    return result
