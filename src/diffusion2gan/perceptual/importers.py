"""`diffusion2gan perceptual import FILE --format NAME`: converts published perceptual networks.

Written from descriptions of the files' layouts. A published network is VGG-16 cut into five slices,
one per feature map. Layers within a slice are matched by their order, since the numbers in their
names also count layers without weights.
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
from diffusion2gan.perceptual.weights import Shapes, find_difference


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


FORMATS = {
    "elatentlpips": Format(
        prefix="net.",
        head="lin",
        network={"num_dropped": 3, "tapped_after_pool": (4, 5)},
        formula={"eps": 1e-8, "eps_inside": True},
        licence="CC-BY-NC by the authors of the elatentlpips package: no commercial use",
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
    ),
}


def import_network(
    file: Path, format_: str, out: Path, widths: tuple[int, ...] = WIDTHS
) -> list[str]:
    """Writes the network in `file` to `out`; returns lines for the user, the licence first.

    Raises UserError for an unknown format, an unreadable file, a pickle that needs to run code, or
    another architecture (naming the first key that differs and both shapes). Nothing is written
    then.
    """
    if format_ not in FORMATS:
        raise UserError(f"no format {format_!r}{nearest(format_, FORMATS)}")
    layout = FORMATS[format_]
    found = read_tensors(file)

    # Build the network that the file should contain, and match its keys
    vgg = VGG(find_channels(layout, found), widths, **layout.network)
    keys = match_keys(vgg, layout, found)

    # Ignore tensors that are stored a second time under another name
    matched_storage = {found[key].data_ptr() for key in keys if key in found}
    shapes: Shapes = {}
    for key, value in found.items():
        if key in keys or value.data_ptr() not in matched_storage:
            shapes[key] = tuple(value.shape)
    difference = find_difference(expected_shapes(vgg, keys), shapes)
    if difference is not None:
        raise UserError(f"{file} is not a checkpoint of format {format_!r}: {difference}.")

    # Copy the weights
    state = vgg.state_dict()
    heads = []
    for key, name in keys.items():
        if name.startswith("heads/"):
            heads.append(found[key].float().flatten())
        else:
            state[name] = found[key].float()
    vgg.load_state_dict(state)

    # Write it
    note = f"Imported from {file.name}, format {format_}. Licence of the weights: {layout.licence}."
    LatentLPIPS(vgg, heads, **layout.formula).save_pretrained(out, note=note)

    messages = [
        f"licence of these weights: {layout.licence}.",
        f"{out}: ELatentLPIPS.from_pretrained({str(out)!r})",
    ]
    num_negative = sum(int((head < 0).sum()) for head in heads)
    if num_negative > 0:
        messages.append(f"{num_negative} head weights are negative and count as zero")
    return messages


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, read without running code from it.

    Batch norm's step counters are left out. Raises UserError if the file cannot be read this way.
    """
    if not file.is_file():
        raise UserError(f"no such file: {file}")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
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
            tensors[str(key)] = value
    return tensors


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
    """Maps the file's keys to ours, in the network's order.

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

    # Heads, in order
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
