"""`diffusion2gan perceptual calibrate`: a network's heads from two-alternative forced choices. Run it again to go on.

The network is frozen and the distance is linear in its heads, so each triplet is run through the network once: what the
heads weigh, ΣC numbers a pair, is kept (`channel_differences`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.checks import check_size
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.images import held_out, to_images
from diffusion2gan.perceptual.ranking import calibrate_heads, two_afc
from diffusion2gan.perceptual.triplets import Triplets, open_triplets, read_triplet
from diffusion2gan.perceptual.weights import load_network
from diffusion2gan.runtime.cache import Cache, Rows, ensure_settings, make_cache
from diffusion2gan.runtime.distributed import require_single_process, resolve_device
from diffusion2gan.runtime.files import sha256, write_json
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.teacher.autoencoder import (
    encode,
    load_vae,
    num_latent_channels,
    spatial_factor,
    vae_revision,
)


def calibrate(
    triplets: Path,
    network: str,
    out: Path,
    vae: str | None = None,
    scored: Path | None = None,
    size: int = 64,
    epochs: int = 10,
    peak_lr: float = 1e-4,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Fits `network`'s heads to `triplets`, writes the calibrated network to `out`; returns the 2AFC scores.

    Scores are of the triplets in `scored`, or of a tenth of each sub-set that is held out. `vae` turns pictures into
    the latents that the network reads; None for one that reads pixels. `size`: the patches' side. What it goes on from
    lies in `out/work`, which nobody needs once the network is there.
    """
    require_single_process("perceptual calibrate")
    place = resolve_device(device, "give --device cpu")
    work = out / "work"
    vgg, heads, formula = load_network(network, "pixel_vgg" if vae is None else "latent_vgg")
    distance = LatentLPIPS(vgg, heads, **formula).to(place)
    opened = open_triplets(triplets)
    to_score = opened if scored is None else open_triplets(scored)
    make, make_scored = (
        differences_of(each, distance, network, vae, size, place) for each in (opened, to_score)
    )
    with exclusive_lock(out / "model.safetensors"):
        cache = make(work)
        ensure_settings(
            work / "settings.json",
            {"epochs": epochs, "peak_lr": peak_lr, "seed": seed, "scored": str(scored)},
        )
        subset = cache.load_all("subset")
        apart = torch.zeros(len(subset), dtype=torch.bool)
        if scored is None:
            apart = held_out(subset, seed)
            check_scored(opened, subset[apart])
        d0, d1, judge = (cache.load_all(name) for name in ("d0", "d1", "judge"))
        new = calibrate_heads(
            d0[~apart],
            d1[~apart],
            judge[~apart],
            heads,
            folder=work,
            epochs=epochs,
            peak_lr=peak_lr,
            seed=seed,
        )
        if scored is not None:
            cache = make_scored(work / "scored")
            apart = torch.ones(len(cache), dtype=torch.bool)
        result = {
            name: scores(cache, apart, number, heads, new)
            for number, name in enumerate(to_score.subsets)
        }
        told = "; ".join(
            f"{name} {row['after']:.1%} (before: {row['before']:.1%})"
            for name, row in result.items()
        )
        LatentLPIPS(vgg.cpu(), new, **formula).save_pretrained(
            out, note=f"Heads calibrated. 2AFC score: {told}."
        )
        write_json(out / "calibrate.json", result)
        return result


def check_scored(triplets: Triplets, apart: Tensor) -> None:
    """Raises UserError where a sub-set has nothing to be scored on."""
    for number, name in enumerate(triplets.subsets):
        if not (apart == number).any():
            raise UserError(
                f"sub-set {name!r} in {triplets.folder} is too small to hold a triplet out; name --scored"
            )


def differences_of(
    triplets: Triplets,
    distance: LatentLPIPS,
    network: str,
    vae: str | None,
    size: int,
    device: torch.device,
) -> Callable[[Path], Cache]:
    """What makes in a folder the rows `d0`, `d1` [ΣC] float32, `judge`, `subset`.

    Raises UserError where VAE or `size` do not fit the network.
    """
    coder = None if vae is None else load_vae(vae, device)
    channels = 3 if coder is None else num_latent_channels(coder)
    if channels != distance.channels:
        has = "pictures are read (no --vae)" if coder is None else f"the latents of {vae} are read"
        raise UserError(
            f"the network in {network} reads {distance.channels} channels, but {has}: {channels} channels. Name the "
            "VAE it was fitted to with --vae."
        )
    check_size(size, 1 if coder is None else spatial_factor(coder), distance.smallest_side)
    spec = {
        "triplets": triplets.digest,
        "subsets": triplets.subsets,
        "size": size,
        "network": network
        if network == "pocket"
        else sha256(Path(network) / "model.safetensors")[:16],
        "vae": None if vae is None else vae_revision(vae),
    }

    def finish(rows: Rows) -> Rows:
        ref, p0, p1 = (to_images(rows[name]).to(device) for name in ("ref", "p0", "p1"))
        if coder is not None:
            ref, p0, p1 = (encode(coder, images) for images in (ref, p0, p1))
        with torch.no_grad():
            d0, d1 = (torch.cat(distance.differences(p, ref), 1).cpu() for p in (p0, p1))
        return {"d0": d0, "d1": d1, "judge": rows["judge"], "subset": rows["subset"]}

    def read(i: int) -> Rows:
        return read_triplet(triplets, i, size)

    return lambda folder: make_cache(folder, spec, len(triplets.refs), read, finish, "triplets")


def scores(
    cache: Cache, apart: Tensor, number: int, before: list[Tensor], after: list[Tensor]
) -> dict[str, Any]:
    """2AFC of sub-set `number` on the rows kept `apart`, with both sets of heads."""
    rows = apart & (cache.load_all("subset") == number)
    d0, d1, judge = (cache.load_all(name)[rows] for name in ("d0", "d1", "judge"))
    both = {
        name: two_afc(d0 @ torch.cat(heads).cpu(), d1 @ torch.cat(heads).cpu(), judge)
        for name, heads in (("before", before), ("after", after))
    }
    return {"count": int(rows.sum()), **both}
