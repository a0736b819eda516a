"""The COCO protocols: a system's pictures of 30 000 or 5 000 captions against all real pictures of the split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import intervals, metrics
from diffusion2gan.evaluate.backbones import ClipSpace, Space, all_cached
from diffusion2gan.evaluate.pictures import (
    CHUNK,
    ImageFolder,
    Pictures,
    chunks,
    fitted,
    image_files,
    middle,
    read_image,
)
from diffusion2gan.evaluate.protocols import Protocol, describe
from diffusion2gan.evaluate.systems import System
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.progress import Bar


def evaluate_coco(
    system: System | ImageFolder, protocol: Protocol, captions: Sequence[str], reference: Path, cache: Path, *,
    inception: Space | None = None, clip: ClipSpace | None = None, dinov2: Space | None = None, seed: int = 0,
    batch_size: int = 1, num_resamples: int = intervals.NUM_RESAMPLES,
) -> dict[str, Any]:  # fmt: skip
    """What the feature spaces given can tell. Pictures and features are kept in `cache`: run again to continue.

    Inception: `frechet_distance` (FID), `patch_frechet_distance`, `kernel_distance` (KID), precision, recall, density,
    coverage. CLIP: `clip_score`, `cmmd`. DINOv2: `frechet_distance_dinov2`. Fréchet distances of so many numbers have
    no interval: one resample would cost minutes. Raises UserError without a feature space.
    """
    if inception is None and clip is None and dinov2 is None:
        raise UserError("no feature network given: name one of --inception, --clip, --dinov2")
    folder, side = cache / "features", protocol.side

    def ours() -> Iterator[Pictures]:
        for some in chunks(system, captions, seed, cache, batch_size=batch_size):
            yield np.stack([fitted(picture, side) for picture in some])

    files = image_files(reference)
    told: dict[str, Any] = {"system": system.name}
    by_caption: dict[str, Any] = {}
    if inception is not None:
        a = all_cached(inception, ours(), folder)
        b = all_cached(inception, real(files, side), folder)
        told["frechet_distance"] = _distance(a, b)
        told["kernel_distance"] = metrics.kernel_distance(a, b)
        by_caption |= vars(metrics.manifold(a, b))
        patches = [
            all_cached(inception, (middle(some, protocol.patch) for some in pictures), folder)
            for pictures in (ours(), real(files, side))
        ]
        told["patch_frechet_distance"] = _distance(*patches)
    if clip is not None:
        a, b = all_cached(clip, ours(), folder), all_cached(clip, real(files, side), folder)
        by_caption["clip_score"] = metrics.cosine(a, clip.texts(captions))
        told["cmmd"] = metrics.cmmd(a, b)
    if dinov2 is not None:
        told["frechet_distance_dinov2"] = _distance(
            all_cached(dinov2, ours(), folder), all_cached(dinov2, real(files, side), folder)
        )
    told |= {key: float(values.mean()) for key, values in by_caption.items()}
    if num_resamples:
        found = {key: intervals.bootstrap_mean(x, num_resamples=num_resamples) for key, x in by_caption.items()}
        told |= {"intervals": {key: list(pair) for key, pair in found.items()}, "num_resamples": num_resamples}
        told["interval_level"] = intervals.LEVEL
    weights = {space.name: space.revision for space in (inception, clip, dinov2) if space is not None}
    contents = hashlib.sha256("".join(f"{path.name}:{sha256(path)}\n" for path in files).encode()).hexdigest()
    told |= {"count": len(captions), "reference_count": len(files), "seed": seed}
    return told | describe(protocol, captions=captions, seed=seed, weights=weights, reference=contents)


def real(files: Sequence[Path], side: int) -> Iterator[Pictures]:
    """[≤ 64, side, side, 3] at a time."""
    with Bar("real pictures", len(files)) as bar:
        for start in range(0, len(files), CHUNK):
            some = files[start : start + CHUNK]
            yield np.stack([fitted(read_image(path), side) for path in some])
            bar.advance(len(some))


def _distance(a: metrics.Features, b: metrics.Features) -> float:
    return metrics.frechet_distance_of_moments(metrics.Moments.of(a), metrics.Moments.of(b))
