"""Protocols, pinned: everything a number depends on besides the system. Numbers of two protocols never mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.runtime.files import read_json


@dataclass(frozen=True)
class Protocol:
    """`count` captions (None: the user's choice); pictures of `side` pixels, made so by `resize`.

    `reference`: what the pictures are held against. `feature_resize`: how a picture comes to a feature network's size.
    `noise`: how a caption's noise is seeded. `patch`: the side of what the patch Fréchet distance looks at.
    """

    name: str
    count: int | None
    side: int
    resize: str
    reference: str
    feature_resize: str
    noise: str
    patch: int


TEACHER = "same_noise_teacher"  # of metrics.json: the key of the system that same-noise distances are taken to
PER_CAPTION = "CPU generator per caption, seed (128 + seed)·2^24 + caption index"
CENTRE_LANCZOS = "largest centre square, Lanczos (Pillow)"
CLEAN = "Inception: bicubic (Pillow), rounded to 8 bit; CLIP, DINOv2: as their own preprocessor_config.json says"

POCKET = Protocol(
    "pocket",
    None,
    64,
    "none: other sizes are refused",
    "renderings of the same captions",
    "none",
    PER_CAPTION,
    32,
)
COCO2014 = Protocol(
    "coco2014-30k",
    30_000,
    256,
    CENTRE_LANCZOS,
    "all of val2014, resized alike",
    CLEAN,
    PER_CAPTION,
    128,
)
COCO2017 = Protocol(
    "coco2017-5k",
    5_000,
    256,
    CENTRE_LANCZOS,
    "all of val2017, resized alike",
    CLEAN,
    PER_CAPTION,
    128,
)
PROTOCOLS = {protocol.name: protocol for protocol in (POCKET, COCO2014, COCO2017)}


def get_protocol(name: str) -> Protocol:
    """Raises UserError at an unknown name: it tells the nearest."""
    if name not in PROTOCOLS:
        raise UserError(f"no such protocol: {name!r}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def read_captions(path: Path, count: int, sha256: str | None = None) -> list[str]:
    """The first `count` captions: the lines of a text file, or COCO's own annotations (`captions_val2014.json`).

    Of the annotations, each picture's caption with the lowest id, pictures in the order of their ids: one list for
    everyone. `sha256` is of the captions chosen (`captions_digest`), so that both forms of one list agree. Raises
    UserError where there are too few, or their digest is another.
    """
    captions = _of_annotations(path) if path.suffix == ".json" else _of_lines(path)
    if len(captions) < count:
        raise UserError(
            f"{path} has {len(captions)} captions, the protocol needs {count}; give a longer file"
        )
    captions = captions[:count]
    digest = captions_digest(captions)
    if sha256 is not None and not (digest.startswith(sha256.lower()) and len(sha256) >= 8):
        raise UserError(
            f"the {count} captions of {path} have sha256 {digest}, not {sha256}: it is another list, and numbers on it "
            "do not compare. Give the list meant, or leave the sha256 out and compare with numbers on this one."
        )
    return captions


def captions_digest(captions: Sequence[str]) -> str:
    """sha256 of the captions, joined by line ends, as UTF-8."""
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()


def _of_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"no captions file {path}; give one caption a line, or COCO's captions_val2014.json"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if "" in lines:
        raise UserError(
            f"{path}: line {lines.index('') + 1} is empty; a caption's line is its index"
        )
    return lines


def _of_annotations(path: Path) -> list[str]:
    told = read_json(path)
    try:
        rows = sorted(
            (int(row["image_id"]), int(row["id"]), str(row["caption"]))
            for row in told["annotations"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not in the form of COCO's caption annotations: {error!r}"
        ) from error
    first: dict[int, str] = {}
    for image_id, _, caption in rows:
        first.setdefault(image_id, " ".join(caption.split()))
    return list(first.values())


def describe(
    protocol: Protocol,
    *,
    captions: Sequence[str],
    seed: int,
    weights: Mapping[str, str],
    reference: str = "",
) -> dict[str, Any]:
    """`protocol`, `protocol_settings` and `protocol_sha256` for metrics.json: equal where numbers may be compared.

    `weights` names the feature networks' weights, `reference` the contents of the reference pictures.
    """
    settings = asdict(protocol) | {
        "count": len(captions),
        "captions_sha256": captions_digest(captions),
        "seed": seed,
        "feature_weights": dict(weights),
        "reference_sha256": reference,
    }
    told = json.dumps(settings, sort_keys=True).encode()
    return {
        "protocol": protocol.name,
        "protocol_settings": settings,
        "protocol_sha256": hashlib.sha256(told).hexdigest(),
    }


def check_same(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError unless all metrics (by system name) were measured by one protocol: it names what differs.

    Metrics without a protocol, of earlier versions, are let pass among themselves only.
    """
    names = list(metrics)
    for name in names[1:]:
        first, other = metrics[names[0]], metrics[name]
        teachers = [one[TEACHER] for one in (first, other) if TEACHER in one]
        if len(set(teachers)) > 1:
            raise UserError(
                f"{names[0]} and {name} were held against different teachers ({teachers[0]} and {teachers[1]}): their "
                "same-noise distances do not compare. Measure one of them again with the other's --teacher."
            )
        if first.get("protocol_sha256") == other.get("protocol_sha256"):
            continue
        a, b = (_flat(m.get("protocol_settings") or {"name": "none"}) for m in (first, other))
        key = next((key for key in [*a, *b] if a.get(key) != b.get(key)), "protocol_sha256")
        raise UserError(
            f"{names[0]} and {name} were measured differently and cannot stand in one table: {key} is "
            f"{a.get(key)!r} for {names[0]} and {b.get(key)!r} for {name}. Measure one of them again."
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat
