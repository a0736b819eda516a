"""The COCO protocols: a system's pictures of 30 000 or 5 000 captions against all real pictures of the split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import intervals, metrics
from diffusion2gan.evaluate.backbones import ClipSpace, Space, all_cached
from diffusion2gan.evaluate.pictures import CHUNK, MAX_DIVERSITY, chunks, fitted, middle, warn_few
from diffusion2gan.evaluate.protocols import Protocol, describe
from diffusion2gan.pipelines.image_folder import ImageFolder, Pictures, image_files, read_image
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.progress import Bar


def evaluate_coco(
    system: System | ImageFolder,
    protocol: Protocol,
    captions: Sequence[str],
    reference: Path,
    cache: Path,
    *,
    inception: Space | None = None,
    clip: ClipSpace | None = None,
    dinov2: Space | None = None,
    seed: int = 0,
    batch_size: int = 1,
    num_resamples: int = intervals.NUM_RESAMPLES,
    teacher: System | ImageFolder | None = None,
    num_noises: int = 1,
) -> dict[str, Any]:
    """What the feature spaces given can tell. Pictures and features are kept in `cache`: run again to continue.

    Inception: `frechet_distance` (FID), `patch_frechet_distance`, `kernel_distance` (KID), precision, recall, density,
    coverage. CLIP: `clip_score`, `cmmd`. DINOv2: `frechet_distance_dinov2`. DINOv2, else CLIP: `same_noise_distance` to
    the pictures of `teacher`, and with `num_noises` above 1 `diversity` on the first captions. Fréchet distances of so
    many numbers have no interval: one resample would cost minutes. Raises UserError without a feature space.
    """
    if inception is None and clip is None and dinov2 is None:
        raise UserError("no feature network given: name one of --inception, --clip, --dinov2")
    folder, side, files = cache / "features", protocol.side, image_files(reference)
    looks = Looks(captions, seed, cache, side, batch_size)
    by_caption, more = similarity(system, teacher, num_noises, dinov2 or clip, looks)
    told: dict[str, Any] = {"system": system.name}
    kernels: dict[str, Any] = {}

    def seen(space: Space) -> tuple[metrics.Features, metrics.Features]:
        return all_cached(space, looks.of(system), folder), all_cached(
            space, real(files, side), folder
        )

    if inception is not None:
        a, b = seen(inception)
        told["frechet_distance"] = _distance(a, b)
        warn_few(
            len(b), b.shape[1], f"give all of the split's pictures with --reference {reference}"
        )
        kernels["kernel_distance"] = (metrics.kernel_distances, a, b)
        by_caption |= vars(metrics.manifold(a, b))
        patches = [
            all_cached(inception, (middle(some, protocol.patch) for some in pictures), folder)
            for pictures in (looks.of(system), real(files, side))
        ]
        told["patch_frechet_distance"] = _distance(*patches)
    if clip is not None:
        a, b = seen(clip)
        by_caption["clip_score"] = metrics.cosine(a, clip.texts(captions))
        kernels["cmmd"] = (metrics.cmmds, a, b)
    if dinov2 is not None:
        told["frechet_distance_dinov2"] = _distance(*seen(dinov2))
    numbers, found = intervals.of_kernels(kernels, paired=False, num_resamples=num_resamples)
    told |= numbers | {key: float(values.mean()) for key, values in by_caption.items()} | more
    if num_resamples:
        found |= {
            key: intervals.bootstrap_mean(x, num_resamples=num_resamples)
            for key, x in by_caption.items()
        }
        told["intervals"] = {key: list(pair) for key, pair in found.items()}
        told |= {"interval_level": intervals.LEVEL, "num_resamples": num_resamples}
    weights = {
        space.name: space.revision for space in (inception, clip, dinov2) if space is not None
    }
    contents = hashlib.sha256(
        "".join(f"{path.name}:{sha256(path)}\n" for path in files).encode()
    ).hexdigest()
    about = describe(protocol, captions=captions, seed=seed, weights=weights, reference=contents)
    return told | {"count": len(captions), "reference_count": len(files), "seed": seed} | about


@dataclass(frozen=True)
class Looks:
    """How a protocol looks at any system: its captions and seed, where pictures are kept, their side."""

    captions: Sequence[str]
    seed: int
    cache: Path
    side: int
    batch_size: int

    def of(
        self, system: System | ImageFolder, nth: int = 0, count: int | None = None
    ) -> Iterator[Pictures]:
        """[≤ 64, side, side, 3] at a time, of the first `count` captions (None: all), each from its `nth` noise."""
        some = self.captions[:count]
        for part in chunks(
            system, some, self.seed, self.cache, nth=nth, batch_size=self.batch_size
        ):
            yield np.stack([fitted(picture, self.side) for picture in part])


def similarity(
    system: System | ImageFolder,
    teacher: System | ImageFolder | None,
    num_noises: int,
    space: Space | None,
    looks: Looks,
) -> tuple[dict[str, metrics.Features], dict[str, Any]]:
    """Distances between a system's own pictures and to its teacher's, by caption; and what they were taken with.

    DreamSim's and DreamDiv's definitions with `space`'s embeddings. Raises UserError where there is no space for it,
    or the two systems' noises are of different shapes.
    """
    by_caption: dict[str, metrics.Features] = {}
    if teacher is None and num_noises == 1:
        return by_caption, {}
    if space is None:
        raise UserError(
            "--teacher and --num-noises compare pictures with one another: name --dinov2 or --clip for it"
        )
    more: dict[str, Any] = {"similarity": f"1 - cosine of {space.name} features"}
    folder = looks.cache / "features"
    if teacher is not None:
        shapes = [getattr(one, "latent_shape", None) for one in (system, teacher)]
        if None not in shapes and shapes[0] != shapes[1]:
            raise UserError(
                f"{system.name} starts from noise of {shapes[0]}, --teacher {teacher.name} of {shapes[1]}: no noise is "
                "the same for both; leave --teacher out"
            )
        pair = [all_cached(space, looks.of(one), folder) for one in (system, teacher)]
        by_caption["same_noise_distance"] = metrics.cosine_distance(*pair)
        more["same_noise_teacher"] = teacher.key
    if num_noises > 1:
        count = min(MAX_DIVERSITY, len(looks.captions))
        several = [
            all_cached(space, looks.of(system, nth, count), folder) for nth in range(num_noises)
        ]
        by_caption["diversity"] = metrics.diversity(
            np.stack(several, axis=1), metrics.cosine_distance
        )
        more |= {"diversity_count": count, "num_noises": num_noises}
    return by_caption, more


def real(files: Sequence[Path], side: int) -> Iterator[Pictures]:
    """[≤ 64, side, side, 3] at a time."""
    with Bar("real pictures", len(files)) as bar:
        for start in range(0, len(files), CHUNK):
            some = files[start : start + CHUNK]
            yield np.stack([fitted(read_image(path), side) for path in some])
            bar.advance(len(some))


def _distance(a: metrics.Features, b: metrics.Features) -> float:
    return metrics.frechet_distance_of_moments(metrics.Moments.of(a), metrics.Moments.of(b))
