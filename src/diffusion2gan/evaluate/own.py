"""The protocol `own`: a system on one's own prompts, against its teacher and one's own real images.

Any number of prompts, images of any size, any feature networks; without one the shipped probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import backbones, intervals, metrics
from diffusion2gan.evaluate.backbones import ClipSpace, FeatureSpace, extract_cached
from diffusion2gan.evaluate.coco import (
    digest_files,
    iterate_real_squares,
    iterate_squares,
    measure_similarity,
)
from diffusion2gan.evaluate.features import load_probe, probe_features, probe_sha256
from diffusion2gan.evaluate.images import (
    NOISE_SET,
    Images,
    ImageSet,
    check_num_noises,
    diversity_image_sets,
    generate_on_all_ranks,
    warn_if_few_images,
)
from diffusion2gan.evaluate.protocols import OWN, TEACHER_KEY, describe_protocol
from diffusion2gan.evaluate.results import Metric, describe_system, mean_metric, metrics_to_dict
from diffusion2gan.evaluate.settings import EvaluateSettings
from diffusion2gan.pipelines.image_folder import ImageFolder, image_files, open_system
from diffusion2gan.pipelines.system import System
from diffusion2gan.prompts import load_prompts
from diffusion2gan.runtime.distributed import get_ranks, resolve_device
from diffusion2gan.runtime.files import read_json
from diffusion2gan.runtime.progress import console

PROBE_SIDE = 64
TO_TEACHER = "_to_teacher"  # ends the names of metrics against the teacher's images

# Resamples for the interval of a Fréchet distance, by the number of the features' dimensions: the
# time of one grows with its cube, to some seconds with 2048
FRECHET_RESAMPLES = ((256, 200), (1024, 100))
FEWEST_FRECHET_RESAMPLES = 40


@dataclass(frozen=True)
class Spaces:
    """The feature networks of an evaluation.

    `main`: of the Fréchet and kernel distances, precision and recall: the first given of Inception,
    DINOv2 and CLIP, otherwise the probe. `similarity`: of the distances between images of the same
    prompt: DINOv2, otherwise CLIP, otherwise `main`.
    """

    main: FeatureSpace
    similarity: FeatureSpace
    clip: ClipSpace | None = None

    @property
    def revisions(self) -> dict[str, str]:
        """Name → revision."""
        revisions = {self.main.name: self.main.revision}
        revisions[self.similarity.name] = self.similarity.revision
        if self.clip is not None:
            revisions[self.clip.name] = self.clip.revision
        return revisions


def evaluate_own(settings: EvaluateSettings) -> dict[str, Any]:
    """All metrics of a system on the prompts of a file; an empty dict on other ranks than 0.

    Raises UserError if there are no prompts or too few, or the teacher's noise has another shape.
    """
    # Prompts
    if settings.prompts is None:
        raise UserError(f"--protocol {OWN.name} needs --prompts FILE")
    if not 0 <= settings.seed < NOISE_SET:
        raise UserError(f"--seed {settings.seed} is out of range; use 0 to {NOISE_SET - 1}")
    loaded = load_prompts(settings.prompts, settings.prompt_column)
    if get_ranks().is_main:
        console.print(loaded.report, soft_wrap=True)
    prompts = loaded.prompts[: settings.count]
    wanted = settings.count or 2
    if len(prompts) < wanted:
        raise UserError(
            f"{settings.prompts} has {len(prompts)} prompts, and {wanted} are needed; give a "
            "longer file, or a lower --count"
        )

    # Feature networks and systems
    device = str(resolve_device(settings.device, "give --device cpu"))
    spaces = load_spaces(settings, device)
    system = open_system(
        settings.system,
        settings.num_inference_steps,
        settings.guidance_scale,
        device,
        settings.precision,
    )
    check_num_noises(system, settings.num_noises)
    teacher = open_teacher(settings, system, device)

    # Images; the teacher's from the same noise; images from further noise for the diversity
    batch_size = settings.batch_size or 1
    image_set = ImageSet(system, prompts, settings.seed, settings.cache, batch_size=batch_size)
    image_sets = [image_set]
    if teacher is not None:
        image_sets.append(replace(image_set, system=teacher))
    image_sets += diversity_image_sets(image_set, settings.num_noises)[1:]
    if not generate_on_all_ranks(image_sets):
        return {}

    # Metrics, and the system's settings
    result = measure(image_set, spaces, settings, teacher)
    result |= describe_system(system, prompts, settings.seed)
    return result


def open_teacher(
    settings: EvaluateSettings, system: System | ImageFolder, device: str
) -> System | ImageFolder | None:
    """The teacher of `settings`, at the size of the system's images; None if there is none.

    If the system is an exported student, it has the guidance scale of the student's pairs.
    """
    name = settings.teacher
    if name is None:
        return None
    is_image_folder = Path(name).is_dir() and not (Path(name) / "model_index.json").exists()
    if is_image_folder:
        return open_system(name)

    # Size
    resolution = None
    if isinstance(system, System):
        height, width = system.image_size
        resolution = height if height == width else None

    # Guidance
    guidance_scale = None
    description = Path(settings.system) / "diffusion2gan.json"
    is_student = (Path(name) / "diffusion2gan.json").is_file()
    if description.is_file() and not is_student:
        guidance_scale = float(read_json(description)["pairs"]["guidance_scale"])
    return open_system(name, None, guidance_scale, device, settings.precision, resolution)


def load_spaces(settings: EvaluateSettings, device: str) -> Spaces:
    """The feature networks of `settings`. Prints which one the distances are taken in."""
    inception = clip = dinov2 = None
    if settings.inception is not None:
        inception = backbones.load_inception(settings.inception, device=device)
    if settings.dinov2 is not None:
        dinov2 = backbones.load_dinov2(settings.dinov2, device)
    if settings.clip is not None:
        clip = backbones.load_clip(settings.clip, device)

    main = inception or dinov2 or clip or probe_space()
    if get_ranks().is_main:
        note = ""
        if main.name == "probe":
            note = (
                ": a small network that comes with this package, trained on drawn scenes of 64 "
                "pixels. It tells coarse differences; for others give --inception FILE (needs the "
                "extra: pip install 'diffusion2gan[eval]'), --dinov2 or --clip"
            )
        console.print(f"distances between images: features of {main.name}{note}", soft_wrap=True)
        if clip is None:
            console.print("clip_score and cmmd are not measured: they need --clip", soft_wrap=True)
    return Spaces(main, dinov2 or clip or main, clip)


def probe_space() -> FeatureSpace:
    """The pocket world's classifier on images resized to 64 × 64 pixels (Lanczos): [N, 128]."""
    probe = load_probe()

    def extract(images: Images) -> backbones.Features:
        resized = []
        for image in images:
            size = (PROBE_SIDE, PROBE_SIDE)
            resized.append(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        return probe_features(probe, np.stack([np.asarray(image) for image in resized]))

    return FeatureSpace("probe", f"{probe_sha256()}-lanczos{PROBE_SIDE}", extract)


def measure(
    image_set: ImageSet,
    spaces: Spaces,
    settings: EvaluateSettings,
    teacher: System | ImageFolder | None,
) -> dict[str, Any]:
    """The metrics of a system's images.

    Against real images: `frechet_distance`, `kernel_distance`, `cmmd`, precision, recall, density
    and coverage; against the teacher's images of the same prompts the same with `_to_teacher` at
    the end of their names. Also `same_noise_distance` to the teacher, `clip_score`, `diversity`.
    """
    num_resamples = settings.num_resamples
    side = find_side(image_set)
    folder = image_set.cache / "features"
    results, extra = measure_similarity(
        image_set, teacher, settings.num_noises, spaces.similarity, side
    )

    def extract(space: FeatureSpace, squares: Iterable[Images]) -> metrics.Features:
        return np.asarray(extract_cached(space, squares, folder))

    # Features of the system's images
    features = extract(spaces.main, iterate_squares(image_set, side))
    embeds = None
    if spaces.clip is not None:
        embeds = extract(spaces.clip, iterate_squares(image_set, side))
        texts = spaces.clip.encode_texts(image_set.prompts)
        results.append(mean_metric("clip_score", metrics.cosine_similarity(embeds, texts)))
    warn_if_few_images(len(features), features.shape[1], "use more prompts")

    # Against the teacher's images of the same prompts, and against real ones
    def compare(iterate: Callable[[], Iterator[Images]], name_end: str, is_paired: bool) -> None:
        others = extract(spaces.main, iterate())
        results.extend(compare_features(features, others, name_end, is_paired, num_resamples))
        if spaces.clip is not None and embeds is not None:
            others = extract(spaces.clip, iterate())
            value, interval = intervals.bootstrap_kernel(
                metrics.cmmds, embeds, others, paired=is_paired, num_resamples=num_resamples
            )
            results.append(Metric(f"cmmd{name_end}", value, interval=interval))

    if teacher is not None:
        teacher_set = replace(image_set, system=teacher)
        compare(lambda: iterate_squares(teacher_set, side), TO_TEACHER, True)
        extra |= describe_teacher(teacher)
    files: list[Path] = []
    if settings.reference is not None:
        files = image_files(settings.reference)
        compare(lambda: iterate_real_squares(files, side), "", False)
        extra["reference_count"] = len(files)

    # The data, the protocol and the feature networks
    result: dict[str, Any] = {"system": image_set.system.name}
    result |= metrics_to_dict(results, num_resamples) | extra
    result |= {
        "features": spaces.main.name,
        "count": len(image_set.prompts),
        "seed": image_set.seed,
    }
    result |= describe_protocol(
        replace(OWN, side=side),
        captions=image_set.prompts,
        seed=image_set.seed,
        weights=spaces.revisions,
        reference=digest_files(files) if files else "",
    )
    return result


def find_side(image_set: ImageSet) -> int:
    """The shorter side of the system's images, of a folder's first: all become such squares."""
    system = image_set.system
    if isinstance(system, System):
        return min(system.image_size)
    return min(next(iter(system.read(range(1)))).shape[:2])


def compare_features(
    a: metrics.Features, b: metrics.Features, name_end: str, is_paired: bool, num_resamples: int
) -> list[Metric]:
    """Distances of the system's features `a` [N, D] to others `b` [M, D].

    `is_paired`: row i of both belongs to the same prompt. Precision, recall, density and coverage
    need more images than neighbours, and are left out with fewer.
    """
    results = [frechet_metric(f"frechet_distance{name_end}", a, b, is_paired, num_resamples)]
    value, interval = intervals.bootstrap_kernel(
        metrics.kernel_distances, a, b, paired=is_paired, num_resamples=num_resamples
    )
    results.append(Metric(f"kernel_distance{name_end}", value, interval=interval))

    if min(len(a), len(b)) > metrics.NEAREST_DENSITY:
        for name, per_image in vars(metrics.manifold(a, b)).items():
            results.append(mean_metric(f"{name}{name_end}", per_image))
    return results


def frechet_metric(
    name: str, a: metrics.Features, b: metrics.Features, is_paired: bool, num_resamples: int
) -> Metric:
    """The Fréchet distance of `a` [N, D] and `b` [M, D], and its interval over prompts.

    Paired rows are resampled together; otherwise `b` is not resampled.
    """
    moments_b = metrics.Moments.from_rows(b)
    value = metrics.frechet_distance_of_moments(metrics.Moments.from_rows(a), moments_b)
    if num_resamples == 0:
        return Metric(name, value)

    def distance_of_rows(rows: intervals.Rows) -> float:
        resampled_b = metrics.Moments.from_rows(b[rows]) if is_paired else moments_b
        return metrics.frechet_distance_of_moments(metrics.Moments.from_rows(a[rows]), resampled_b)

    limit = FEWEST_FRECHET_RESAMPLES
    for dimension, resamples in reversed(FRECHET_RESAMPLES):
        if a.shape[1] <= dimension:
            limit = resamples
    interval = intervals.bootstrap(
        distance_of_rows, len(a), num_resamples=min(num_resamples, limit), point=value
    )
    return Metric(name, value, interval=interval)


def describe_teacher(teacher: System | ImageFolder) -> dict[str, Any]:
    """What the teacher's images depend on: numbers to different teachers are not comparable."""
    description: dict[str, Any] = {TEACHER_KEY: teacher.key, "teacher": teacher.name}
    if isinstance(teacher, System):
        description["teacher_num_inference_steps"] = teacher.num_inference_steps
        description["teacher_guidance_scale"] = teacher.guidance_scale
    return description
