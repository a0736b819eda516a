"""Published perceptual networks become folders of ours: `diffusion2gan perceptual import FILE --format NAME`.

Written from descriptions of the files' layouts. Inside a slice a trunk's layers are told by their order, since the
numbers in their names also count layers without weights.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import STAGES, VGG, WIDTHS
from diffusion2gan.perceptual.weights import find_difference


@dataclass(frozen=True)
class Format:
    """A layout: `trunk` and `head` are patterns of keys; `network` and `formula` the settings that reproduce theirs."""

    trunk: str
    head: str
    network: dict[str, Any]
    formula: dict[str, Any]
    licence: str


FORMATS = {
    "elatentlpips": Format(
        r"net\.slice(\d)\.(\d+)\.(\w+)",
        r"lin(\d)\.model\.1\.weight",
        {"num_dropped": 3, "tapped_after_pool": (4, 5)},
        {"eps": 1e-8, "eps_inside": True},
        "CC-BY-NC by the authors of the elatentlpips package: no commercial use",
    ),
    # pool 5 comes behind the last tap; groups and eps are not described: PyTorch's and LPIPS's usual ones
    "snu": Format(
        r"slice(\d)\.(\d+)\.(\w+)",
        r"linear(\d)\.model\.1\.weight",
        {"num_dropped": 2, "num_groups": 32},
        {"eps": 1e-10, "eps_inside": False},
        "its publisher's, which this package does not know: read it before you use the weights",
    ),
}


def import_network(
    file: Path, format_: str, out: Path, widths: tuple[int, ...] = WIDTHS
) -> list[str]:
    """Writes the network in `file` to `out`; returns what the user should know, its licence first.

    Raises UserError at an unknown format, an unreadable file, a pickle that wants to run code, or another
    architecture (naming the first key that differs and both shapes). Nothing is written then.
    """
    if format_ not in FORMATS:
        raise UserError(f"no format {format_!r}{nearest(format_, FORMATS)}")
    layout = FORMATS[format_]
    found = read_tensors(file)
    channels = next(
        (v.shape[1] for k, v in found.items() if re.fullmatch(layout.trunk, k) and v.ndim == 4), 4
    )
    vgg = VGG(channels, widths, **layout.network)
    keys = matching_keys(vgg, layout, found)
    known = {
        found[key].data_ptr() for key in keys if key in found
    }  # a tensor may be stored under a second name too
    found = {
        key: value for key, value in found.items() if key in keys or value.data_ptr() not in known
    }
    if difference := find_difference(
        expected_shapes(vgg, keys), {k: tuple(v.shape) for k, v in found.items()}
    ):
        raise UserError(f"{file} is no checkpoint of format {format_!r}: {difference}.")
    trunk = {name: found[key] for key, name in keys.items() if name in vgg.state_dict()}
    vgg.load_state_dict(vgg.state_dict() | {name: value.float() for name, value in trunk.items()})
    heads = [
        found[key].float().flatten() for key, name in keys.items() if name.startswith("heads/")
    ]
    note = f"Imported from {file.name}, format {format_}. Licence of the weights: {layout.licence}."
    LatentLPIPS(vgg, heads, **layout.formula).save_pretrained(out, note=note)
    negative = sum(int((head < 0).sum()) for head in heads)
    told = [
        f"licence of these weights: {layout.licence}.",
        f"{out}: ELatentLPIPS.from_pretrained({str(out)!r})",
    ]
    return told + ([f"{negative} head weights are negative and count as zero"] if negative else [])


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, read without running any code of it; batch norm's step counters left out."""
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle raise many kinds
        asked = re.search(
            r"GLOBAL (\S+)", str(error)
        )  # torch names what a pickle wants beside tensors
        if asked is None:
            raise UserError(
                f"{file} cannot be read as plain tensors: it is cut off, damaged or no checkpoint of torch's "
                f"({type(error).__name__}). Fetch it again, or compare its size and digest with the publisher's."
            ) from error
        raise UserError(
            f"{file} holds more than plain tensors: it asks for {asked[1]}, and a checkpoint that needs to run code is "
            "refused. Ask its publisher for the state dict alone."
        ) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(
        isinstance(value, Tensor) for value in loaded.values()
    ):
        raise UserError(f"{file} holds no table of tensors; give the network's state dict.")
    return {
        str(key): value
        for key, value in loaded.items()
        if not str(key).endswith("num_batches_tracked")
    }


def matching_keys(vgg: VGG, layout: Format, found: dict[str, Tensor]) -> dict[str, str]:
    """Their key → ours, in the network's order; where theirs lacks one, ours stands for it and will be missed."""
    matches = sorted(
        ((re.fullmatch(layout.trunk, key), key) for key in found), key=lambda pair: pair[1]
    )
    layers: dict[int, list[int]] = {stage: [] for stage in range(1, len(STAGES) + 1)}
    for match, _ in matches:
        if match and int(match[1]) in layers and int(match[2]) not in layers[int(match[1])]:
            layers[int(match[1])].append(int(match[2]))
    prefix = "net." if layout.trunk.startswith("net") else ""
    keys: dict[str, str] = {}
    for name in vgg.state_dict():
        if name.endswith("num_batches_tracked"):
            continue
        _, stage, place, tensor = name.split(".")
        number = 2 * (int(place) // 3) + int(place) % 3  # ours counts conv, norm, ReLU
        theirs = sorted(layers[int(stage) + 1])
        layer = theirs[number] if number < len(theirs) else f"<layer {number}>"
        keys[f"{prefix}slice{int(stage) + 1}.{layer}.{tensor}"] = name
    heads = sorted(key for key in found if re.fullmatch(layout.head, key))
    stem = layout.head.split("(")[0]
    for level in range(len(STAGES)):
        keys[heads[level] if level < len(heads) else f"{stem}<{level}>.model.1.weight"] = (
            f"heads/{level}"
        )
    return keys


def expected_shapes(vgg: VGG, keys: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """Of each key in `keys`; a head is a 1×1 convolution to one channel."""
    ours = {name: tuple(value.shape) for name, value in vgg.state_dict().items()}
    widths = vgg.config["widths"]
    ours |= {f"heads/{level}": (1, width, 1, 1) for level, width in enumerate(widths)}
    return {key: ours[name] for key, name in keys.items()}
