"""Evaluation protocols: all settings, besides the system, that a metric depends on.

Metrics of different protocols are never shown in one table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.prompts import read_lines
from diffusion2gan.runtime.files import read_json
from diffusion2gan.runtime.images import READING


@dataclass(frozen=True)
class Protocol:
    """The fixed settings of a protocol. They are written to metrics.json and hashed.

    `count`: number of captions (None: the user's choice). `side`: the images' side in pixels,
    reached by `resize`. `reference`: the images compared with. `feature_resize`: how an image is
    resized to a feature network's input size. `noise`: how a caption's noise is seeded. `patch`:
    the side in pixels of the patches of the patch Fréchet distance. `reading`: how image files are
    read, if the protocol reads any.
    """

    name: str
    count: int | None
    side: int
    resize: str
    reference: str
    feature_resize: str
    noise: str
    patch: int
    reading: str = ""


# The key in metrics.json of the system that same-noise distances are measured to
TEACHER_KEY = "same_noise_teacher"

PER_CAPTION = "CPU generator per caption, seed (128 + seed)·2^24 + caption index"
CENTRE_LANCZOS = "largest centre square, Lanczos (Pillow)"
CLEAN = (
    "Inception: bicubic (Pillow), rounded to 8 bit; CLIP, DINOv2: "
    "as their own preprocessor_config.json says"
)

POCKET = Protocol(
    name="pocket",
    count=None,
    side=64,
    resize="none: other sizes are refused",
    reference="renderings of the same captions",
    feature_resize="none",
    noise=PER_CAPTION,
    patch=32,
)
COCO2014 = Protocol(
    name="coco2014-30k",
    count=30_000,
    side=256,
    resize=CENTRE_LANCZOS,
    reference="all of val2014, resized alike",
    feature_resize=CLEAN,
    noise=PER_CAPTION,
    patch=128,
    reading=READING,
)
COCO2017 = Protocol(
    name="coco2017-5k",
    count=5_000,
    side=256,
    resize=CENTRE_LANCZOS,
    reference="all of val2017, resized alike",
    feature_resize=CLEAN,
    noise=PER_CAPTION,
    patch=128,
    reading=READING,
)
OWN = Protocol(
    name="own",
    count=None,
    side=0,  # that of the system's images
    resize=CENTRE_LANCZOS,
    reference="any images, resized alike; the teacher's images of the same prompts and noises",
    feature_resize=f"{CLEAN}; probe: 64 px, Lanczos",
    noise=PER_CAPTION,
    patch=0,  # none
    reading=READING,
)
PROTOCOLS = {protocol.name: protocol for protocol in (POCKET, OWN, COCO2014, COCO2017)}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises UserError if there is none, with the closest name."""
    if name not in PROTOCOLS:
        raise UserError(f"no such protocol: {name!r}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def read_captions(path: Path, count: int, sha256: str | None = None) -> list[str]:
    """The first `count` captions of a text file or of COCO's annotations (captions_val2014.json).

    A text file has one caption per line. Of the annotations, each image's caption with the lowest
    id is used, the images in the order of their ids, so that everyone gets the same list. `sha256`
    (at least 8 digits) is compared with `captions_digest` of the chosen captions, so it is the
    same for both forms of a list. Raises UserError if there are too few captions or the digest
    differs.
    """
    if path.suffix.lower() == ".json":
        captions = _read_annotations(path)
    else:
        remedy = "give a text file with one caption per line, or COCO's captions_val2014.json"
        captions = read_lines(path, "caption", remedy)
    if len(captions) < count:
        raise UserError(
            f"{path} has {len(captions)} captions, the protocol needs {count}; give a longer file"
        )

    # Compare their digest
    captions = captions[:count]
    digest = captions_digest(captions)
    if sha256 is None:
        return captions
    if len(sha256) < 8 or not digest.startswith(sha256.lower()):
        raise UserError(
            f"the {count} captions of {path} have sha256 {digest}, not {sha256}: it is another "
            "list, and numbers measured on it are not comparable. Give the expected list, or "
            "leave --captions-sha256 out and compare only with numbers measured on this list."
        )
    return captions


def captions_digest(captions: Sequence[str]) -> str:
    """sha256 of the captions, joined by line ends, as UTF-8."""
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()


def _read_annotations(path: Path) -> list[str]:
    """One caption per image of COCO's annotations. Raises UserError if the format is another."""
    annotations = read_json(path)
    try:
        rows = []
        for row in annotations["annotations"]:
            rows.append((int(row["image_id"]), int(row["id"]), str(row["caption"])))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not have the format of COCO's caption annotations: {error!r}"
        ) from error

    # The caption with the lowest id comes first and is kept
    captions: dict[int, str] = {}
    for image_id, _, caption in sorted(rows):
        if image_id not in captions:
            captions[image_id] = " ".join(caption.split())
    return list(captions.values())


def describe_protocol(
    protocol: Protocol,
    *,
    captions: Sequence[str],
    seed: int,
    weights: Mapping[str, str],
    reference: str = "",
) -> dict[str, Any]:
    """`protocol`, `protocol_settings` and `protocol_sha256` of metrics.json.

    They are equal if the numbers are comparable. `weights`: feature network → sha256 of its
    weights. `reference`: sha256 of the reference images.
    """
    settings = asdict(protocol)
    if not protocol.reading:
        del settings["reading"]
    settings["count"] = len(captions)
    settings["captions_sha256"] = captions_digest(captions)
    settings["seed"] = seed
    settings["feature_weights"] = dict(weights)
    settings["reference_sha256"] = reference

    encoded = json.dumps(settings, sort_keys=True).encode()
    return {
        "protocol": protocol.name,
        "protocol_settings": settings,
        "protocol_sha256": hashlib.sha256(encoded).hexdigest(),
    }


def check_same_protocol(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError unless all metrics (by system name) were measured by one protocol.

    The message names the first setting that differs. Metrics without a protocol, written by
    earlier versions, are accepted only among themselves.
    """
    names = list(metrics)
    if not names:
        return
    first_name = names[0]
    first = metrics[first_name]

    for name in names[1:]:
        other = metrics[name]

        # Same-noise distances compare only if they are measured to the same teacher
        teacher, other_teacher = first.get(TEACHER_KEY), other.get(TEACHER_KEY)
        if TEACHER_KEY in first and TEACHER_KEY in other and teacher != other_teacher:
            raise UserError(
                f"the same-noise distances of {first_name} and {name} were measured to different "
                f"teachers ({teacher} and {other_teacher}) and are not comparable. Measure one of "
                "them again with the other's --teacher."
            )

        # The protocols' settings
        if first.get("protocol_sha256") == other.get("protocol_sha256"):
            continue
        a = _flatten(first.get("protocol_settings") or {"name": "none"})
        b = _flatten(other.get("protocol_settings") or {"name": "none"})
        differing = [key for key in [*a, *b] if a.get(key) != b.get(key)]
        key = differing[0] if differing else "protocol_sha256"
        raise UserError(
            f"{first_name} and {name} were measured differently and cannot be shown in one table: "
            f"{key} is {a.get(key)!r} for {first_name} and {b.get(key)!r} for {name}. Measure one "
            "of them again with the other's options."
        )


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of inner mappings by `key.inner_key`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            for inner_key, inner_value in value.items():
                flat[f"{key}.{inner_key}"] = inner_value
        else:
            flat[key] = value
    return flat
