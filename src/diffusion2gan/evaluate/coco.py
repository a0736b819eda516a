"""The COCO protocols: images of 30 000 or 5 000 captions against all real images of the split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import backbones, intervals, metrics
from diffusion2gan.evaluate.backbones import ClipSpace, FeatureSpace, extract_cached
from diffusion2gan.evaluate.images import (
    CHUNK,
    Images,
    ImageSet,
    centre_crop,
    check_num_noises,
    diversity_image_sets,
    generate_on_all_ranks,
    iterate_images,
    resize_centre_square,
    warn_if_few_images,
)
from diffusion2gan.evaluate.protocols import (
    TEACHER_KEY,
    Protocol,
    describe_protocol,
    read_captions,
)
from diffusion2gan.evaluate.results import Metric, describe_system, mean_metric, metrics_to_dict
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.pipelines.image_folder import ImageFolder, image_files, open_system, read_image
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.files import sha256
from diffusion2gan.runtime.progress import Bar


@dataclass(frozen=True)
class FeatureSpaces:
    """The feature networks to measure with. Raises UserError if there is none."""

    inception: FeatureSpace | None = None
    clip: ClipSpace | None = None
    dinov2: FeatureSpace | None = None

    def __post_init__(self) -> None:
        if self.inception is None and self.clip is None and self.dinov2 is None:
            raise UserError(
                "no feature network given: name at least one of --inception, --clip, --dinov2"
            )

    @property
    def revisions(self) -> dict[str, str]:
        """Name → revision of the networks given."""
        spaces = (self.inception, self.clip, self.dinov2)
        return {space.name: space.revision for space in spaces if space is not None}


def evaluate_coco(settings: EvaluateSettings, protocol: Protocol) -> dict[str, Any]:
    """A system's metrics by a COCO protocol (see `measure`); an empty dict on other ranks than 0.

    Each rank generates on its own GPU. Raises UserError if captions or reference images are not
    given or missing, or the captions are not the ones expected.
    """
    if protocol.count is None:
        raise UserError(
            f"--protocol {protocol.name} generates its captions itself; it is not a COCO protocol"
        )
    if settings.captions is None or settings.reference is None:
        raise UserError(f"--protocol {protocol.name} needs --captions FILE and --reference FOLDER")
    captions = read_captions(settings.captions, protocol.count, settings.captions_sha256)

    # Device, feature networks and systems
    device = str(resolve_device(settings.device, "give --device cpu"))
    precision = settings.precision
    spaces = load_feature_spaces(settings, device)
    system = open_system(
        settings.system, settings.num_inference_steps, settings.guidance_scale, device, precision
    )
    check_num_noises(system, settings.num_noises)

    # Images; the teacher's images from the same noise; images from further noise for the diversity
    batch_size = settings.batch_size or 1
    image_set = ImageSet(system, captions, settings.seed, settings.cache, batch_size=batch_size)
    image_sets = [image_set]
    teacher = None
    if settings.teacher is not None:
        teacher = open_system(settings.teacher, device=device, precision=precision)
        image_sets.append(replace(image_set, system=teacher))
    image_sets += diversity_image_sets(image_set, settings.num_noises)[1:]
    if not generate_on_all_ranks(image_sets):
        return {}

    # Metrics, and the system's settings
    result = measure(
        image_set,
        protocol,
        settings.reference,
        spaces,
        teacher=teacher,
        num_noises=settings.num_noises,
        num_resamples=settings.num_resamples,
    )
    result |= describe_system(system, captions, settings.seed)
    return result


def load_feature_spaces(settings: EvaluateSettings, device: str) -> FeatureSpaces:
    """The feature networks of `settings`.

    Raises UserError if none is given or one fails to load.
    """
    inception = clip = dinov2 = None
    if settings.inception is not None:
        inception = backbones.load_inception(settings.inception, device=device)
    if settings.clip is not None:
        clip = backbones.load_clip(settings.clip, device)
    if settings.dinov2 is not None:
        dinov2 = backbones.load_dinov2(settings.dinov2, device)
    return FeatureSpaces(inception, clip, dinov2)


def measure(
    image_set: ImageSet,
    protocol: Protocol,
    reference: Path,
    spaces: FeatureSpaces,
    *,
    teacher: System | ImageFolder | None = None,
    num_noises: int = 1,
    num_resamples: int = intervals.NUM_RESAMPLES,
) -> dict[str, Any]:
    """All metrics that the feature networks allow.

    Images and features are cached, so running again continues.

    - Inception: `frechet_distance` (FID), `patch_frechet_distance`, `kernel_distance` (KID),
      precision, recall, density and coverage.
    - CLIP: `clip_score`, `cmmd`.
    - DINOv2: `frechet_distance_dinov2`.
    - DINOv2, or CLIP without it: `same_noise_distance` to the images of `teacher`, and with
      `num_noises` above 1 `diversity` on the first captions.

    These Fréchet distances have no interval: with so many dimensions one resample takes minutes.
    """
    captions, side = image_set.prompts, protocol.side
    folder = _feature_folder(image_set)
    files = image_files(reference)

    def extract_both(space: FeatureSpace) -> tuple[metrics.Features, metrics.Features]:
        """[N, D] of the system's images, [M, D] of the reference."""
        generated = extract_cached(space, iterate_squares(image_set, side), folder)
        real = extract_cached(space, iterate_real_squares(files, side), folder)
        return generated, real

    # Distances between images
    results, extra = measure_similarity(
        image_set, teacher, num_noises, spaces.dinov2 or spaces.clip, side
    )

    if spaces.inception is not None:
        # FID
        a, b = extract_both(spaces.inception)
        results.append(Metric("frechet_distance", _frechet_distance(a, b)))
        remedy = f"use all images of the split for --reference {reference}"
        warn_if_few_images(len(b), b.shape[1], remedy)

        # KID, precision, recall, density and coverage
        value, interval = intervals.bootstrap_kernel(
            metrics.kernel_distances, a, b, paired=False, num_resamples=num_resamples
        )
        results.append(Metric("kernel_distance", value, interval=interval))
        for name, per_image in vars(metrics.manifold(a, b)).items():
            results.append(mean_metric(name, per_image))

        # Fréchet distance of patches
        patches = []
        for squares in (iterate_squares(image_set, side), iterate_real_squares(files, side)):
            cropped = (centre_crop(chunk, protocol.patch) for chunk in squares)
            patches.append(extract_cached(spaces.inception, cropped, folder))
        results.append(Metric("patch_frechet_distance", _frechet_distance(*patches)))

    if spaces.clip is not None:
        # CLIP score, CMMD
        a, b = extract_both(spaces.clip)
        scores = metrics.cosine_similarity(a, spaces.clip.encode_texts(captions))
        results.append(mean_metric("clip_score", scores))
        value, interval = intervals.bootstrap_kernel(
            metrics.cmmds, a, b, paired=False, num_resamples=num_resamples
        )
        results.append(Metric("cmmd", value, interval=interval))

    if spaces.dinov2 is not None:
        # Fréchet distance in DINOv2 features
        distance = _frechet_distance(*extract_both(spaces.dinov2))
        results.append(Metric("frechet_distance_dinov2", distance))

    # The data, the protocol and the feature networks
    result: dict[str, Any] = {"system": image_set.system.name}
    result |= metrics_to_dict(results, num_resamples) | extra
    result |= {
        "count": len(captions),
        "reference_count": len(files),
        "seed": image_set.seed,
    }
    result |= describe_protocol(
        protocol,
        captions=captions,
        seed=image_set.seed,
        weights=spaces.revisions,
        reference=digest_files(files),
    )
    return result


def measure_similarity(
    image_set: ImageSet,
    teacher: System | ImageFolder | None,
    num_noises: int,
    space: FeatureSpace | None,
    side: int,
) -> tuple[list[Metric], dict[str, Any]]:
    """Distances of a system's images to its teacher's and among themselves.

    Also returns further keys of metrics.json, which describe how they were measured.

    DreamSim's and DreamDiv's definitions with the embeddings of `space`. Raises UserError if there
    is no such space, or the two systems' noises have different shapes.
    """
    if teacher is None and num_noises == 1:
        return [], {}
    if space is None:
        raise UserError(
            "--teacher and --num-noises compare generated images with one another and need a "
            "feature network: give --dinov2 or --clip"
        )
    system = image_set.system
    folder = _feature_folder(image_set)
    results: list[Metric] = []
    extra: dict[str, Any] = {"similarity": f"1 - cosine of {space.name} features"}

    # Distance to the teacher's images of the same noises
    if teacher is not None:
        shape = getattr(system, "latent_shape", None)
        teacher_shape = getattr(teacher, "latent_shape", None)
        if shape is not None and teacher_shape is not None and shape != teacher_shape:
            raise UserError(
                f"{system.name} starts from noise of shape {shape}, --teacher {teacher.name} from "
                f"{teacher_shape}: the two cannot start from the same noise; leave --teacher out"
            )
        a = extract_cached(space, iterate_squares(image_set, side), folder)
        teacher_set = replace(image_set, system=teacher)
        b = extract_cached(space, iterate_squares(teacher_set, side), folder)
        results.append(mean_metric("same_noise_distance", metrics.cosine_distance(a, b)))
        extra[TEACHER_KEY] = teacher.key

    # Distance between the images of one caption
    if num_noises > 1:
        several = []
        for diversity_set in diversity_image_sets(image_set, num_noises):
            several.append(extract_cached(space, iterate_squares(diversity_set, side), folder))
        features = np.stack(several, axis=1)  # [N, K, D]
        per_caption = metrics.diversity(features, metrics.cosine_distance)
        results.append(mean_metric("diversity", per_caption))
        extra["diversity_count"] = len(features)
        extra["num_noises"] = num_noises

    return results, extra


def iterate_squares(image_set: ImageSet, side: int) -> Iterator[Images]:
    """Yields [≤ 64, side, side, 3]: the images' centre squares, resized."""
    for chunk in iterate_images(image_set):
        yield np.stack([resize_centre_square(image, side) for image in chunk])


def iterate_real_squares(files: Sequence[Path], side: int) -> Iterator[Images]:
    """Yields [≤ 64, side, side, 3]: the reference images' centre squares, resized."""
    with Bar("reference images", len(files)) as bar:
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            yield np.stack([resize_centre_square(read_image(path), side) for path in chunk])
            bar.advance(len(chunk))


def _feature_folder(image_set: ImageSet) -> Path:
    return image_set.cache / "features"


def _frechet_distance(a: metrics.Features, b: metrics.Features) -> float:
    return metrics.frechet_distance_of_moments(
        metrics.Moments.from_rows(a), metrics.Moments.from_rows(b)
    )


def digest_files(files: Sequence[Path]) -> str:
    """sha256 of the names and contents of `files`."""
    lines = [f"{path.name}:{sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
