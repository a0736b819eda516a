"""`diffusion2gan perceptual import FILE … --format NAME`: converts published perceptual networks.

Written from descriptions of the files' layouts. A published network is VGG-16 cut into five slices,
one per feature map. Layers within a slice of a network on latents are matched by their order, since
the numbers in their names also count layers without weights. Standard LPIPS has torchvision's
numbers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import STAGES, VGG, WIDTHS
from diffusion2gan.perceptual.weights import Shapes, find_difference
from diffusion2gan.runtime.files import translate_error

# Standard LPIPS (Zhang et al. 2018): the numbers of the convolutions of each stage in torchvision's
# VGG-16 without norm, and the scaling of images in [−1, 1]
TORCHVISION_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Format:
    """The layout of a published checkpoint.

    The network's tensors are named `{prefix}slice{stage}.{layer}.{tensor}`, stages counted from 1;
    the heads `{head}{level}.model.1.weight`, each a 1×1 convolution to one channel.
    """

    prefix: str
    head: str
    # Arguments of `VGG` and of `LatentLPIPS` that reproduce the published distance.
    network: dict[str, Any]
    formula: dict[str, Any]
    licence: str
    # How to call the published distance; `{out}` is the folder in quotes.
    usage: str
    # What the files must contain, for error messages.
    contents: str
    # Whether it is standard LPIPS: a trunk without norm, with a scaling layer and heads of 0 or
    # more, whose layers are numbered as in torchvision.
    is_standard: bool = False


FORMATS = {
    "elatentlpips": Format(
        prefix="net.",
        head="lin",
        network={"num_dropped": 3, "tapped_after_pool": (4, 5)},
        formula={"eps": 1e-8, "eps_inside": True},
        licence="CC-BY-NC by the authors of the elatentlpips package: no commercial use",
        usage=(
            'ELatentLPIPS.from_pretrained({out}, transforms="blit+geometric", l1_weight=1.0) is '
            "what the package computes by default; ELatentLPIPS.from_pretrained({out}), with "
            "geometric+cutout and no L1, is the paper's loss"
        ),
        contents="a state dict of the elatentlpips package",
    ),
    # Its fifth pool follows the last feature map and has no effect. The number of groups and eps
    # are not described: these are PyTorch's and LPIPS's usual values.
    "snu": Format(
        prefix="",
        head="linear",
        network={"num_dropped": 2, "num_groups": 32},
        formula={"eps": 1e-10, "eps_inside": False},
        licence=(
            "set by its publisher and not recorded in this package: "
            "read it before you use the weights"
        ),
        usage=(
            "LatentLPIPS.from_pretrained({out}) is the published distance; "
            "ELatentLPIPS.from_pretrained({out}) adds random transforms"
        ),
        contents="VGG-16 with GroupNorm in slices, and heads linear0 … linear4",
    ),
    # The trunk is in torchvision's layout, `features.{layer}.{tensor}`, if it comes separately.
    "lpips": Format(
        prefix="net.",
        head="lin",
        network={
            "num_dropped": 0,
            "has_norm": False,
            "input_shift": LPIPS_SHIFT,
            "input_scale": LPIPS_SCALE,
        },
        formula={"eps": 1e-10, "eps_inside": False},
        licence=(
            "BSD 2-clause by the authors of the lpips package for the heads; the trunk's is set by "
            "its publisher, torchvision"
        ),
        usage=(
            "LatentLPIPS.from_pretrained({out}) is what the package computes, for images in "
            "[−1, 1]; PixelLPIPS.from_pretrained({out}, vae=VAE) decodes latents first, as does "
            'loss = "pixel_lpips" with perceptual = {out} in a recipe'
        ),
        contents=(
            "torchvision's VGG-16 without norm (vgg16-397923af.pth), and the lpips package's heads "
            "for it (weights/v0.1/vgg.pth), as two files; or a state dict of lpips.LPIPS(net='vgg')"
        ),
        is_standard=True,
    ),
}


def import_network(
    files: Sequence[Path], format_: str, out: Path, widths: tuple[int, ...] = WIDTHS
) -> list[str]:
    """Writes the network in `files` to `out`; returns lines for the user, the licence first.

    Raises UserError for an unknown format, an unreadable file, a pickle that needs to run code,
    another architecture (naming the first key that differs and both shapes), and for negative heads
    of standard LPIPS. Nothing is written then.
    """
    if format_ not in FORMATS:
        raise UserError(f"no format {format_!r}{nearest(format_, FORMATS)}")
    layout = FORMATS[format_]
    source = " with ".join(str(file) for file in files)
    found = merge_tensors(files)

    # Build the network that the files should contain, and match its keys
    network = dict(layout.network)
    if layout.is_standard:
        network |= pop_scaling_layer(found, source)
        found = {key: value for key, value in found.items() if not key.startswith("classifier.")}
        vgg = VGG(3, widths, **network)
        keys = match_torchvision_keys(found) | match_heads(layout, found)
    else:
        vgg = VGG(find_channels(layout, found), widths, **network)
        keys = match_keys(vgg, layout, found) | match_heads(layout, found)

    # Ignore tensors that are stored a second time under another name
    matched = [found[key] for key in keys if key in found]
    shapes: Shapes = {}
    for key, value in found.items():
        if key in keys or not is_among(value, matched):
            shapes[key] = tuple(value.shape)
    difference = find_difference(expected_shapes(vgg, keys), shapes)
    if difference is not None:
        raise UserError(
            f"{source} is not a checkpoint of format {format_!r}: {difference}. This format is "
            f"{layout.contents}."
        )

    # Copy the weights
    state = vgg.state_dict()
    heads = []
    for key, name in keys.items():
        if name.startswith("heads/"):
            heads.append(found[key].float().flatten())
        else:
            state[name] = found[key].float()
    vgg.load_state_dict(state)
    if layout.is_standard:
        refuse_negative_heads(heads, source)

    # Write it
    names = " and ".join(file.name for file in files)
    note = f"Imported from {names}, format {format_}. Licence of the weights: {layout.licence}."
    LatentLPIPS(vgg, heads, **layout.formula).save_pretrained(out, note=note)

    messages = [
        f"licence of these weights: {layout.licence}.",
        f"{out}: {layout.usage.format(out=repr(str(out)))}",
    ]
    num_negative = sum(int((head < 0).sum()) for head in heads)
    if num_negative > 0:
        messages.append(f"{num_negative} head weights are negative and count as zero")
    return messages


def merge_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all files by name. Raises UserError if two files contradict each other."""
    merged: dict[str, Tensor] = {}
    for file in files:
        for key, value in read_tensors(file).items():
            if key in merged and not is_among(value, [merged[key]]):
                raise UserError(
                    f"{key} is in more than one of the files, {list(merged[key].shape)} in an "
                    f"earlier one and {list(value.shape)} in {file}, with other values; give each "
                    "part of the network once"
                )
            merged[key] = value
    return merged


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, read without running code from it.

    The prefix `module.` of a network saved from a data-parallel wrapper is removed, and batch
    norm's step counters are left out. Raises UserError if the file cannot be read this way.
    """
    if not file.is_file():
        raise UserError(f"no such file: {file}")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        failure = translate_error(file, error)
        if failure is not None:
            raise failure from error
        # torch, zip and pickle raise many kinds. For a pickle that needs more than tensors, torch's
        # message names the first function or class that it needs.
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            raise UserError(
                f"{file} cannot be read as plain tensors: it is truncated, damaged or not a torch "
                f"checkpoint ({type(error).__name__}). Download it again, or compare its size and "
                "digest with the publisher's."
            ) from error
        raise UserError(
            f"{file} contains more than plain tensors: it needs {needed[1]}, and a checkpoint that "
            "needs to run code is refused. Ask its publisher for the state dict alone."
        ) from error

    if isinstance(loaded, dict):
        loaded = loaded.get("state_dict", loaded)
    is_table = isinstance(loaded, dict)
    if not is_table or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(
            f"{file} does not contain a table of tensors; give the network's state dict."
        )

    tensors = {}
    for key, value in loaded.items():
        if not str(key).endswith("num_batches_tracked"):
            tensors[str(key).removeprefix("module.")] = value
    return tensors


def is_among(value: Tensor, tensors: list[Tensor]) -> bool:
    """Whether one of the tensors has the same shape and values."""
    return any(value.shape == other.shape and torch.equal(value, other) for other in tensors)


def pop_scaling_layer(found: dict[str, Tensor], source: str) -> dict[str, tuple[float, ...]]:
    """Removes lpips's `scaling_layer.*` from `found`; returns them as settings of `VGG`.

    Empty if there are none, as in a trunk of torchvision. Raises UserError if one of the two is
    missing, or has another shape than [1, 3, 1, 1].
    """
    names = [key for key in ("scaling_layer.shift", "scaling_layer.scale") if key in found]
    if len(names) == 1:
        raise UserError(
            f"{source} has {names[0]} but not the other one of scaling_layer.shift and "
            "scaling_layer.scale: the file is incomplete. Take both from the lpips package's state "
            "dict, or none."
        )
    settings = {}
    for name in ("shift", "scale"):
        values = found.pop(f"scaling_layer.{name}", None)
        if values is None:
            continue
        if values.shape != (1, 3, 1, 1):
            raise UserError(
                f"{source}: scaling_layer.{name} is {list(values.shape)}, [1, 3, 1, 1] is expected"
            )
        # Shortest decimals that are the same float32, as in -0.03
        decimals = [float(str(value)) for value in values.float().flatten().numpy()]
        settings[f"input_{name}"] = tuple(decimals)
    return settings


def match_torchvision_keys(found: dict[str, Tensor]) -> dict[str, str]:
    """Maps the keys of VGG-16 without norm to ours, in the network's order.

    They are `features.{layer}.{tensor}`, as in torchvision, or `net.slice{stage}.{layer}.{tensor}`
    with the same numbers, as in the lpips package.
    """
    is_sliced = any(key.startswith("net.slice") for key in found)
    keys = {}
    for stage, layers in enumerate(TORCHVISION_LAYERS):
        for order, layer in enumerate(layers):
            file_layer = f"net.slice{stage + 1}.{layer}" if is_sliced else f"features.{layer}"
            for tensor in ("weight", "bias"):
                # Ours has two layers, convolution and ReLU, per convolution
                keys[f"{file_layer}.{tensor}"] = f"stages.{stage}.{2 * order}.{tensor}"
    return keys


def refuse_negative_heads(heads: list[Tensor], source: str) -> None:
    """Raises UserError if a head has a negative weight, which LPIPS excludes in training."""
    for level, head in enumerate(heads):
        num_negative = int((head < 0).sum())
        if num_negative > 0:
            raise UserError(
                f"{source}: {num_negative} of the {len(head)} weights of lin{level} are negative "
                f"(smallest {float(head.min()):.3g}). The heads of LPIPS are 0 or more, so this "
                "file is damaged or of something else. Take the heads from the lpips package: "
                "weights/v0.1/vgg.pth"
            )


def find_trunk_key(layout: Format, key: str) -> tuple[int, int] | None:
    """(stage, layer) of a key of the network, both as numbered in the file; None for other keys."""
    match = re.fullmatch(rf"{re.escape(layout.prefix)}slice(\d)\.(\d+)\.\w+", key)
    if match is None:
        return None
    return int(match[1]), int(match[2])


def find_channels(layout: Format, found: dict[str, Tensor]) -> int:
    """The input channels of the first convolution; 4 if there is none."""
    for key, value in found.items():
        if find_trunk_key(layout, key) is not None and value.ndim == 4:
            return value.shape[1]
    return 4


def match_keys(vgg: VGG, layout: Format, found: dict[str, Tensor]) -> dict[str, str]:
    """Maps the keys of a network with norms to ours, in the network's order.

    A layer or head that the file lacks gets a key with its number in angle brackets, such as
    `lin<4>.model.1.weight`, which `find_difference` then reports as missing.
    """
    # The numbers of the layers with weights in each slice of the file
    file_layers: dict[int, set[int]] = {stage: set() for stage in range(1, len(STAGES) + 1)}
    for key in found:
        position = find_trunk_key(layout, key)
        if position is not None and position[0] in file_layers:
            stage, layer = position
            file_layers[stage].add(layer)

    # Network: `stages.{stage}.{layer}.{tensor}`, stages counted from 0, three layers (convolution,
    # norm, ReLU) per convolution, of which two have weights
    keys: dict[str, str] = {}
    for name in vgg.state_dict():
        if name.endswith("num_batches_tracked"):
            continue
        _, our_stage, our_layer, tensor = name.split(".")
        stage = int(our_stage) + 1
        num_blocks, layer_in_block = divmod(int(our_layer), 3)
        order = 2 * num_blocks + layer_in_block
        layers = sorted(file_layers[stage])
        layer_name = str(layers[order]) if order < len(layers) else f"<layer {order}>"
        keys[f"{layout.prefix}slice{stage}.{layer_name}.{tensor}"] = name
    return keys


def match_heads(layout: Format, found: dict[str, Tensor]) -> dict[str, str]:
    """Maps the keys of the file's heads to ours, in order; names missing ones as `match_keys`."""
    keys: dict[str, str] = {}
    head_keys = sorted(
        key for key in found if re.fullmatch(rf"{layout.head}\d\.model\.1\.weight", key)
    )
    for level in range(len(STAGES)):
        missing_key = f"{layout.head}<{level}>.model.1.weight"
        key = head_keys[level] if level < len(head_keys) else missing_key
        keys[key] = f"heads/{level}"
    return keys


def expected_shapes(vgg: VGG, keys: dict[str, str]) -> Shapes:
    """The shape that each key of the file should have; a head is a 1×1 convolution."""
    shapes: Shapes = {name: tuple(value.shape) for name, value in vgg.state_dict().items()}
    for level, width in enumerate(vgg.config["widths"]):
        shapes[f"heads/{level}"] = (1, width, 1, 1)
    return {key: shapes[name] for key, name in keys.items()}
