"""All options of an evaluation, and the protocols that use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.intervals import NUM_RESAMPLES
from diffusion2gan.evaluate.protocols import POCKET, PROTOCOLS, Protocol

DEFAULT_COUNT = 1000  # captions of the pocket protocol

POCKET_ONLY = ("count",)
COCO_ONLY = (
    "captions",
    "captions_sha256",
    "reference",
    "inception",
    "clip",
    "dinov2",
    "teacher",
    "batch_size",
)


@dataclass(frozen=True)
class EvaluateSettings:
    """The options of an evaluation.

    None means not set; setting an option that the protocol does not use is an error. `system`: a
    name for `load_system`, or a folder of images by caption index. `cache`: the folder in which
    images and features are kept and reused. `num_noises`: images per caption of the first 256
    captions; above 1 `diversity` is measured too. `num_resamples`: resamples for the bootstrap
    intervals; 0: no intervals.
    """

    system: str
    cache: Path
    protocol: str = POCKET.name
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_noises: int = 1
    num_resamples: int = NUM_RESAMPLES
    device: str = "auto"  # of the systems; under COCO of the feature networks too
    precision: str = "float32"  # of the systems

    # The pocket protocol only
    count: int | None = None  # held-out captions; DEFAULT_COUNT if not set

    # COCO protocols only
    captions: Path | None = None  # required
    captions_sha256: str | None = None  # expected digest of the captions
    reference: Path | None = None  # required: the folder of real images
    inception: Path | None = None  # weights of the FID network
    clip: str | None = None  # folder or hub id
    dinov2: str | None = None  # folder or hub id
    teacher: str | None = None  # the system that same-noise distances are measured to
    batch_size: int | None = None  # images generated at once; 1 if not set


def check_options(settings: EvaluateSettings, protocol: Protocol) -> None:
    """Raises UserError if an option is set that `protocol` does not use."""
    if protocol.count is None:
        unused = _set_options(settings, COCO_ONLY)
        reason = (
            "it makes its captions and reference images itself, and measures with its feature "
            "networks on the CPU"
        )
        coco_names = [name for name, other in PROTOCOLS.items() if other.count is not None]
        remedy = f"choose a COCO protocol ({', '.join(coco_names)})"
    else:
        unused = _set_options(settings, POCKET_ONLY)
        reason = f"it is defined on exactly {protocol.count} captions"
        remedy = f"choose --protocol {POCKET.name}"

    if unused:
        options = ", ".join(unused)
        raise UserError(
            f"--protocol {protocol.name} does not use {options}: {reason}. Leave {options} out, or "
            f"{remedy}."
        )


def _set_options(settings: EvaluateSettings, names: tuple[str, ...]) -> list[str]:
    """The options among `names` that are set, as they are written on the command line."""
    options = []
    for name in names:
        if getattr(settings, name) is not None:
            options.append("--" + name.replace("_", "-"))
    return options
