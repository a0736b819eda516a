"""A perceptual network on disk.

config.json: the network's settings and those of its formula; model.safetensors: `vgg/…` and
`heads/0` … `heads/4`; README.md: a model card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan import assets
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write, read_json, sha256, write_json
from diffusion2gan.runtime.markdown import markdown_text
from diffusion2gan.runtime.progress import console

POCKET_FACTOR = 4  # the pocket VAE's downsampling factor
FORMULA = ("eps", "eps_inside")  # keys of config.json beside the network's settings
CARD = """---
library_name: diffusion2gan
tags: [perceptual-loss, lpips, latent-diffusion]
---

# Perceptual network for {channels}-channel {inputs}

VGG-16 {norm}, widths {widths}, its first {num_dropped} pools dropped, and non-negative heads:
a distance in the manner of LPIPS.{note}

```python
from diffusion2gan import {name}

distance = {name}.from_pretrained("this folder"{options})
distance(a, b)  # [B]; a, b [B, {example}, h, w] latents × scaling_factor
```
"""

Shapes = dict[str, tuple[int, ...]]


def load_network(source: str | Path, shipped_name: str) -> tuple[VGG, list[Tensor], dict[str, Any]]:
    """(network, heads, the formula's settings) of a folder in float32.

    `source` is a folder, or `pocket` for the network `shipped_name` inside the package. Raises
    UserError if a file is missing, the weights do not match config.json or a head is negative,
    Failure if a file is damaged.
    """
    folder = assets.folder(shipped_name) if str(source) == "pocket" else Path(source)

    # Settings
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(
            f"{folder / 'config.json'} does not describe a perceptual network: "
            "it contains no settings"
        )

    # Weights
    tensors, _ = checkpoint.load(folder / "model.safetensors")
    for key, value in tensors.items():
        if value.is_floating_point():
            tensors[key] = value.float()

    # The network
    formula = {key: config.pop(key) for key in FORMULA if key in config}
    settings: dict[str, Any] = {}
    for key, value in config.items():
        settings[key] = tuple(value) if isinstance(value, list) else value
    try:
        vgg = VGG(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not describe a perceptual network: {error}"
        ) from error

    # Load the weights into it
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    difference = find_difference(expected_shapes(vgg), found)
    if difference is not None:
        raise UserError(f"the weights in {folder} do not match its config.json: {difference}")
    checkpoint.check_finite(tensors, f"the network in {folder} is damaged; restore the original.")
    vgg.load_state_dict(checkpoint.unpack("vgg", tensors))
    heads = [tensors[f"heads/{level}"] for level in range(len(vgg.config["widths"]))]
    for level, head in enumerate(heads):
        if (head < 0).any():
            raise UserError(
                f"heads/{level} in {folder} has {int((head < 0).sum())} negative weights (the "
                f"lowest is {float(head.min()):.3g}), so its distance could be negative. The heads "
                "of an LPIPS network are 0 or more: import or calibrate it again."
            )
    return vgg, heads, formula


def network_revision(network: str) -> str:
    """Identifies the weights of a network: `pocket`, or a folder."""
    if network == "pocket":
        return network
    return sha256(Path(network) / "model.safetensors")[:16]


def check_fits(source: str, channels: int, factor: int, teacher_name: str) -> None:
    """Checks that the network `source` can be used for the teacher's latents or images.

    `channels` is their number of channels and `factor` the VAE's downsampling factor; factor
    1 means images. Raises UserError if `source` is not a network or reads another number of
    channels. Prints a warning for the pocket network, which was fitted to another VAE with the same
    number of channels.
    """
    pixels = factor == 1
    inputs = "images" if pixels else "latents"
    remedy = (
        "Fit one: diffusion2gan perceptual fit --images LABELLED_IMAGES "
        f"{'--pixels' if pixels else '--vae VAE'} --out NAME, then perceptual calibrate, "
        "and set perceptual=NAME."
    )
    if not pixels:
        remedy += (
            " Or set perceptual=teacher or perceptual=decoder: distances on the features of the "
            "teacher or of its VAE's decoder, which need neither images nor calibration."
        )

    # Is it a network?
    if source == "pocket":
        folder = assets.folder("pixel_vgg" if pixels else "latent_vgg")
    else:
        folder = Path(source)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"perceptual = {source!r} is not a perceptual network: "
            f"{folder} has no config.json. {remedy}"
        )

    # Does it fit?
    network_channels = read_json(folder / "config.json").get("in_channels")
    if network_channels != channels:
        raise UserError(
            f"perceptual = {source!r} reads {network_channels} channels; "
            f"{teacher_name}'s {inputs} have {channels}. {remedy}"
        )
    if source == "pocket" and factor not in (1, POCKET_FACTOR):
        console.print(
            f"warning: perceptual = 'pocket' was fitted to another VAE than {teacher_name}'s. "
            f"{remedy}",
            soft_wrap=True,
        )


def expected_shapes(vgg: VGG) -> Shapes:
    """The shape of every tensor that model.safetensors contains for this network."""
    shapes: Shapes = {}
    for key, value in vgg.state_dict().items():
        shapes[f"vgg/{key}"] = tuple(value.shape)
    for level, width in enumerate(vgg.config["widths"]):
        shapes[f"heads/{level}"] = (width,)
    return shapes


def find_difference(expected: Shapes, found: Shapes) -> str | None:
    """Describes the first difference, in the order of `expected`; None if there is none.

    A difference is a key with another shape (both are named), a missing or a surplus key. With a
    missing key, the first surplus one is named too: it may be the same tensor by another name.
    """
    surplus = [f"{key}, {list(shape)}" for key, shape in found.items() if key not in expected]
    for key, shape in expected.items():
        if key not in found:
            instead = f"; instead there is {surplus[0]}" if surplus else ""
            return f"{key}, {list(shape)}, is missing{instead}"
        if found[key] != shape:
            return f"{key} is {list(found[key])}, {list(shape)} is expected"
    if surplus:
        return f"{surplus[0]}, is not expected"
    return None


def save_network(
    folder: Path,
    vgg: VGG,
    heads: list[Tensor],
    formula: dict[str, Any],
    dtype: torch.dtype,
    note: str,
) -> None:
    """Writes a network for `load_network`, and a model card that ends with `note`.

    Each file is written atomically, the weights first. Raises Failure, and writes nothing, if a
    weight is not finite in `dtype`.
    """
    tensors = checkpoint.pack("vgg", vgg)
    for level, head in enumerate(heads):
        tensors[f"heads/{level}"] = head
    for key, value in tensors.items():
        if value.is_floating_point():
            tensors[key] = value.to(dtype)

    if checkpoint.find_non_finite(tensors):
        raise Failure(
            f"a weight of the network is not finite in {dtype}: nothing was written to {folder}"
        )

    checkpoint.save(folder / "model.safetensors", tensors, {})
    write_json(folder / "config.json", vgg.config | formula)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(render_card(vgg.config, note), encoding="utf-8")


def render_card(config: dict[str, Any], note: str) -> str:
    """The model card of a network with these settings."""
    norm = "with batch norm"
    if not config.get("has_norm", True):
        norm = "without norm"
    elif config["num_groups"]:
        norm = f"with GroupNorm ({config['num_groups']} groups)"

    # Usage, by the kind of input
    if config["in_channels"] == 3:
        usage = {
            "inputs": "images",
            "name": "PixelLPIPS",
            "options": ', vae="your VAE"',
            "example": "C",
        }
    else:
        usage = {
            "inputs": "VAE latents",
            "name": "ELatentLPIPS",
            "options": "",
            "example": config["in_channels"],
        }

    return CARD.format(
        channels=config["in_channels"],
        norm=norm,
        widths=", ".join(map(str, config["widths"])),
        num_dropped=config["num_dropped"],
        note=f"\n\n{markdown_text(note)}" if note else "",
        **usage,
    )
