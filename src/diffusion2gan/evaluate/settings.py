"""All options of an evaluation, and the protocols that use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.intervals import NUM_RESAMPLES
from diffusion2gan.evaluate.protocols import OWN, POCKET, PROTOCOLS, Protocol

DEFAULT_COUNT = 1000  # captions of the pocket protocol

# The options that a protocol uses beyond those that all use
COCO_OPTIONS = (
    "captions",
    "captions_sha256",
    "reference",
    "inception",
    "clip",
    "dinov2",
    "teacher",
    "batch_size",
)
OWN_OPTIONS = (
    "prompts",
    "prompt_column",
    "count",
    "reference",
    "inception",
    "clip",
    "dinov2",
    "teacher",
    "batch_size",
)
POCKET_OPTIONS = ("count",)
ALL_OPTIONS = (*COCO_OPTIONS, "count", "prompts", "prompt_column")


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
    protocol: str | None = None  # `own` with prompts, otherwise `pocket`
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_noises: int = 1
    num_resamples: int = NUM_RESAMPLES
    device: str = "auto"  # of the systems; under COCO of the feature networks too
    precision: str = "float32"  # of the systems

    # The pocket protocol and one's own prompts
    count: int | None = None  # captions; DEFAULT_COUNT, or all prompts, if not set

    # One's own prompts only
    prompts: Path | None = None  # a file that `load_prompts` reads
    prompt_column: str | None = None  # its column, if it is a table

    # COCO protocols only
    captions: Path | None = None  # required
    captions_sha256: str | None = None  # expected digest of the captions

    # COCO protocols and one's own prompts
    reference: Path | None = None  # the folder of real images; COCO needs it
    inception: Path | None = None  # weights of the FID network
    clip: str | None = None  # folder or hub id
    dinov2: str | None = None  # folder or hub id
    teacher: str | None = None  # the system that same-noise distances are measured to
    batch_size: int | None = None  # images generated at once; 1 if not set


def default_protocol(settings: EvaluateSettings) -> str:
    """The protocol if none is named: one's own prompts if there are any, or the pocket world."""
    return OWN.name if settings.prompts is not None else POCKET.name


def check_options(settings: EvaluateSettings, protocol: Protocol) -> None:
    """Raises UserError if an option is set that `protocol` does not use."""
    coco_names = [name for name, other in PROTOCOLS.items() if other.count is not None]
    used: tuple[str, ...]
    if protocol == POCKET:
        used = POCKET_OPTIONS
        reason = (
            "it makes its captions and reference images itself, and measures with its feature "
            "networks on the CPU"
        )
        remedy = f"give --prompts, or choose a COCO protocol ({', '.join(coco_names)})"
    elif protocol == OWN:
        used = OWN_OPTIONS
        reason = "its captions are those of --prompts"
        remedy = f"choose a COCO protocol ({', '.join(coco_names)})"
    else:
        used = COCO_OPTIONS
        reason = f"it is defined on exactly {protocol.count} captions, those of --captions"
        remedy = f"choose --protocol {POCKET.name}, or give --prompts without a protocol"

    unused = _set_options(settings, tuple(name for name in ALL_OPTIONS if name not in used))
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
