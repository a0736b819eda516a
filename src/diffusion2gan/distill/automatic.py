"""The settings of a recipe that are `auto`: the values that this machine and teacher give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion2gan.distill.run import read_description
from diffusion2gan.recipe import Recipe, parse_recipe
from diffusion2gan.runtime.distributed import get_ranks, rank_device
from diffusion2gan.runtime.progress import console

NETWORKS = Path("networks")  # where `auto` looks for a network fitted to the teacher's VAE


def resolve_recipe(recipe: Recipe, out: Path | None = None) -> Recipe:
    """The recipe with a value instead of each `auto`: of device, precision and perceptual.

    If `out` contains a run, its values are taken, so that it can be resumed with the same command
    anywhere; except a GPU and its precision on a machine without one. Prints which distance was
    chosen and why. Raises UserError if the values do not go together.
    """
    values = recipe.model_dump()
    in_run = read_run_settings(out)

    # Device
    if recipe.device == "auto":
        device = in_run.get("device")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = rank_device("auto").partition(":")[0]
        values["device"] = device

    # Precision
    if recipe.precision == "auto":
        default = default_precision(values["device"])
        same_device = in_run.get("device") == values["device"]
        values["precision"] = in_run.get("precision", default) if same_device else default

    # Perceptual network
    if recipe.perceptual == "auto":
        perceptual, reason = choose_perceptual(recipe)
        if "perceptual" in in_run:
            perceptual, reason = in_run["perceptual"], "as in the run to resume"
        values["perceptual"] = perceptual
        if recipe.loss not in ("mse", "pseudo_huber") and get_ranks().is_main:
            console.print(f"perceptual = {perceptual!r}: {reason}", soft_wrap=True)

    if values["precision"] == "bfloat16":
        parse_recipe(values, "the recipe on this machine")  # refuses it on a CPU
    return recipe.model_copy(update=values)


def read_run_settings(out: Path | None) -> dict[str, Any]:
    """The settings of the run in the folder `out`; empty if there is none."""
    if out is None or not (out / "recipe.json").is_file():
        return {}
    settings: dict[str, Any] = read_description(out)["recipe"]
    return settings


def default_precision(device: str) -> str:
    """bfloat16 on a GPU that computes in it, otherwise float32."""
    if not device.startswith("cuda"):
        return "float32"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def choose_perceptual(recipe: Recipe) -> tuple[str, str]:
    """(the value of `perceptual` for a recipe's teacher, the reason for it).

    This is the shipped network for the pocket teacher and for images; otherwise the network in
    `networks/TEACHER`, or the VAE's decoder if there is none.
    """
    if recipe.teacher == "pocket" or recipe.loss == "pixel_lpips":
        return "pocket", "the shipped network"

    # A network fitted to this teacher's VAE, by the name of its folder, file or hub id
    name = Path(recipe.teacher.partition("@")[0]).name.removesuffix(".safetensors")
    folder = NETWORKS / name
    if (folder / "config.json").is_file():
        return str(folder), "the network fitted to this teacher's VAE"
    return "decoder", (
        f"the distance on the features of the VAE's decoder, which needs no data, because there is "
        f"no fitted network in {folder} (made by perceptual fit and calibrate)"
    )
