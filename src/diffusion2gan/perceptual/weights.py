"""A perceptual network on disk: config.json (the network and its formula), model.safetensors, README.md (a card)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write, read_json, write_json
from diffusion2gan.runtime.progress import console

POCKET_FACTOR = 4  # how many times smaller the pocket VAE's latents are
FORMULA = ("eps", "eps_inside")  # config.json holds these beside the network's own settings
CARD = """---
library_name: diffusion2gan
tags: [perceptual-loss, lpips, latent-diffusion]
---

# Perceptual network for {channels}-channel {what}

VGG-16 with {norm}, widths {widths}, its first {num_dropped} pools dropped, and non-negative heads: a distance in the
manner of LPIPS.{note}

```python
from diffusion2gan import {name}

distance = {name}.from_pretrained("this folder"{options})
distance(a, b)  # [B]; a, b [B, {example}, h, w] latents × scaling_factor
```
"""


def load_network(source: str | Path, shipped_name: str) -> tuple[VGG, list[Tensor], dict[str, Any]]:
    """(network, heads, the formula's settings) from `pocket` or a folder, in float32.

    Raises UserError where a file is missing or the weights are not those of config.json, Failure where one is damaged.
    """
    folder = assets.folder(shipped_name) if str(source) == "pocket" else Path(source)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(
            f"{folder / 'config.json'} describes no network of ours: it holds no settings"
        )
    tensors, _ = checkpoint.load(folder / "model.safetensors")
    tensors = {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }
    formula = {key: config.pop(key) for key in FORMULA if key in config}
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
    }
    try:
        vgg = VGG(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'} describes no network of ours: {error}"
        ) from error
    if difference := first_difference(
        shapes_of(vgg), {key: tuple(value.shape) for key, value in tensors.items()}
    ):
        raise UserError(
            f"the weights in {folder} are not those its config.json describes: {difference}"
        )
    vgg.load_state_dict(checkpoint.unpack("vgg", tensors))
    return vgg, [tensors[f"heads/{level}"] for level in range(len(config["widths"]))], formula


def check_fits(source: str, channels: int, factor: int, whose: str) -> None:
    """Raises UserError where `source` is no network, or none for latents of so many `channels` (`factor` 1: pictures).

    Says so where it is the pocket's, which was fitted to another VAE of as many channels.
    """
    pixels = factor == 1
    remedy = (
        f"Fit one: diffusion2gan perceptual fit --images LABELLED_PICTURES {'--pixels' if pixels else '--vae VAE'} "
        "--out NAME, then perceptual calibrate, and set perceptual=NAME."
    ) + (
        ""
        if pixels
        else " Or set perceptual=teacher: a distance on the teacher's own features, which needs neither."
    )
    folder = (
        Path(source)
        if source != "pocket"
        else assets.folder("pixel_vgg" if pixels else "latent_vgg")
    )
    if not (folder / "config.json").is_file():
        raise UserError(f"perceptual = {source!r}: there is no network (no config.json). {remedy}")
    reads = read_json(folder / "config.json").get("in_channels")
    if reads != channels:
        what = "pictures" if pixels else "latents"
        raise UserError(
            f"perceptual = {source!r} reads {reads} channels; {whose}'s {what} have {channels}. {remedy}"
        )
    if source == "pocket" and factor not in (1, POCKET_FACTOR):
        console.print(
            f"warning: perceptual = 'pocket' was fitted to another VAE than {whose}'s. {remedy}",
            soft_wrap=True,
        )


def shapes_of(vgg: VGG) -> dict[str, tuple[int, ...]]:
    """Every tensor that model.safetensors holds for this network."""
    trunk = {f"vgg/{key}": tuple(value.shape) for key, value in vgg.state_dict().items()}
    return trunk | {f"heads/{level}": (width,) for level, width in enumerate(vgg.config["widths"])}


def first_difference(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> str | None:
    """The first key, in the order of `expected`, with another shape, with both; missing and surplus ones too."""
    for key, shape in expected.items():
        if key not in found:
            return f"{key}, {list(shape)}, is missing"
        if found[key] != shape:
            return f"{key} is {list(found[key])}, {list(shape)} is expected"
    surplus = next((key for key in found if key not in expected), None)
    return f"{surplus}, {list(found[surplus])}, is not expected" if surplus else None


def save_network(
    folder: Path,
    vgg: VGG,
    heads: list[Tensor],
    formula: dict[str, Any],
    dtype: torch.dtype,
    note: str,
) -> None:
    """The reverse of `load_network`, with a card. Each file is written whole or not at all, the weights first."""
    tensors = checkpoint.pack("vgg", vgg) | {
        f"heads/{level}": head for level, head in enumerate(heads)
    }
    halved = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in tensors.items()
    }
    if not all(torch.isfinite(value).all() for value in halved.values()):
        raise Failure(
            f"a weight of the network is not finite in {dtype}: nothing was written to {folder}"
        )
    checkpoint.save(folder / "model.safetensors", halved, {})
    write_json(folder / "config.json", vgg.config | formula)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card(vgg.config, note), encoding="utf-8")


def card(config: dict[str, Any], note: str) -> str:
    pixels = config["in_channels"] == 3
    return CARD.format(
        channels=config["in_channels"],
        what="pictures" if pixels else "VAE latents",
        norm=f"GroupNorm ({config['num_groups']} groups)" if config["num_groups"] else "batch norm",
        widths=", ".join(map(str, config["widths"])),
        num_dropped=config["num_dropped"],
        note=f"\n\n{note}" if note else "",
        name="PixelLPIPS" if pixels else "ELatentLPIPS",
        options=', vae="your VAE"' if pixels else "",
        example="C" if pixels else config["in_channels"],
    )
