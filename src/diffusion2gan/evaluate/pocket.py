"""The pocket protocol: images of the pocket world's held-out captions.

References are the teacher's images of the same noises, and renderings of the same captions. The
feature networks run on the CPU in float32 whatever the systems' device, so that the same images
have the same metrics everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import intervals, metrics
from diffusion2gan.evaluate.features import (
    ATTRIBUTES,
    PocketClip,
    clip_sha256,
    load_probe,
    probe_features,
    probe_sha256,
    score_attributes_per_image,
)
from diffusion2gan.evaluate.images import (
    CHUNK,
    NOISE_SET,
    Images,
    ImageSet,
    centre_crop,
    check_num_noises,
    diversity_image_sets,
    generate_on_all_ranks,
    iterate_image_sets,
    warn_if_few_images,
)
from diffusion2gan.evaluate.protocols import POCKET, describe_protocol
from diffusion2gan.evaluate.results import Metric, describe_system, mean_metric, metrics_to_dict
from diffusion2gan.evaluate.settings import DEFAULT_COUNT, EvaluateSettings
from diffusion2gan.pipelines.image_folder import open_system
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.distributed import resolve_device
from diffusion2gan.runtime.images import to_uint8

HELD_OUT_WORLD = 1000  # + seed: captions and images that no training stage uses


def evaluate_pocket(settings: EvaluateSettings) -> dict[str, Any]:
    """All metrics of a system on held-out captions; an empty dict on other ranks than 0.

    Raises UserError if `count` or `seed` is out of range, or the images are not 64 × 64 pixels.
    """
    count = DEFAULT_COUNT if settings.count is None else settings.count
    seed = settings.seed
    if count < 2:
        raise UserError(f"--count {count} is too small: at least 2 images are needed")
    if not 0 <= seed < NOISE_SET:
        raise UserError(f"--seed {seed} is out of range; use 0 to {NOISE_SET - 1}")

    # The system, its teacher and the captions
    device = str(resolve_device(settings.device, "give --device cpu"))
    precision = settings.precision
    system = open_system(
        settings.system, settings.num_inference_steps, settings.guidance_scale, device, precision
    )
    check_num_noises(system, settings.num_noises)
    teacher = load_system("pocket-teacher", device=device, precision=precision)
    prompts = scenes.captions(range(count), HELD_OUT_WORLD + seed)

    # Images from the same noise; images from further noise for the diversity
    image_set = ImageSet(system, prompts, seed, settings.cache)
    teacher_set = replace(image_set, system=teacher)
    diversity_sets = diversity_image_sets(image_set, settings.num_noises)
    if not generate_on_all_ranks([image_set, teacher_set, *diversity_sets[1:]]):
        return {}

    # On rank 0 all images are now in the cache, or are generated as they are measured
    several = None
    if settings.num_noises > 1:
        several = iterate_pocket_images(diversity_sets)
    teacher_sets = [] if system.key == teacher.key else [teacher_set]
    features = extract_features(
        iterate_pocket_images([image_set, *teacher_sets]), partial(draw_real, seed=seed), prompts
    )
    diversity = None if several is None else measure_diversity(several)

    # Metrics, and the settings and weights that they were measured with
    result: dict[str, Any] = {"system": settings.system}
    result |= measure(features, diversity, num_resamples=settings.num_resamples)
    if diversity is not None:
        result["diversity_count"] = len(diversity)
        result["num_noises"] = settings.num_noises
    weights = {"clip_weights_sha256": clip_sha256(), "probe_weights_sha256": probe_sha256()}
    result |= weights
    result |= describe_system(system, prompts, seed)
    result |= {"count": count, "seed": seed}
    result |= describe_protocol(POCKET, captions=prompts, seed=seed, weights=weights)
    return result


@dataclass(frozen=True)
class PocketFeatures:
    """What the metrics need of N images, of the teacher's images, and of N renderings (`…_real`).

    `probe`, `patches` [N, 128]: of the image and of its centre. `clip` [N, D] and `texts` [N, D]:
    CLIP's embeddings. `patch_similarity` [N, P]: the cosine of each patch with that of the
    teacher's image. `answers`: `score_attributes_per_image`.
    """

    probe: metrics.Features
    probe_real: metrics.Features
    patches: metrics.Features
    patches_real: metrics.Features
    clip: metrics.Features
    clip_real: metrics.Features
    texts: metrics.Features
    patch_similarity: metrics.Features
    answers: list[dict[str, list[bool]]]


def extract_features(
    images: Iterable[Sequence[Images]], draw: Callable[[range], Images], prompts: Sequence[str]
) -> PocketFeatures:
    """The features of images that are given in chunks, and of no more than a chunk at a time.

    `images` yields the chunks [n, 64, 64, 3] of the system and of its teacher, or a single one if
    they are the same system. `draw` renders the captions of these indices.
    """
    clip = PocketClip()
    probe = load_probe()
    columns: dict[str, list[metrics.Features]] = {
        "probe": [],
        "probe_real": [],
        "patches": [],
        "patches_real": [],
        "clip": [],
        "clip_real": [],
        "patch_similarity": [],
    }
    answers: list[dict[str, list[bool]]] = []

    num_images = 0
    for chunk, *teacher_chunks in images:
        indices = range(num_images, num_images + len(chunk))
        num_images += len(chunk)
        real_chunk = draw(indices)

        # The probe, of full images and of their centres
        columns["probe"].append(probe_features(probe, chunk))
        columns["probe_real"].append(probe_features(probe, real_chunk))
        columns["patches"].append(probe_features(probe, cut_centres(chunk)))
        columns["patches_real"].append(probe_features(probe, cut_centres(real_chunk)))
        chunk_prompts = prompts[indices.start : indices.stop]
        answers += score_attributes_per_image(probe, chunk, chunk_prompts)

        # CLIP
        found = clip.encode_images(chunk)
        teacher = clip.encode_images(teacher_chunks[0]) if teacher_chunks else found
        columns["clip"].append(found.image_embeds)
        columns["clip_real"].append(clip.encode_images(real_chunk).image_embeds)
        columns["patch_similarity"].append(
            metrics.cosine_similarity(found.patches, teacher.patches)
        )

    joined = {name: np.concatenate(chunks) for name, chunks in columns.items()}
    return PocketFeatures(**joined, texts=clip.encode_texts(prompts), answers=answers)


def cut_centres(images: Images) -> Images:
    """The centres of [N, H, W, 3] that the patch Fréchet distance compares."""
    return np.ascontiguousarray(centre_crop(images, POCKET.patch))


def measure_diversity(several: Iterable[Sequence[Images]]) -> metrics.Features:
    """[M]: the diversity of the images of each prompt.

    `several` yields chunks of prompts: for each of K noises the images [n, 64, 64, 3].
    """
    clip = PocketClip()
    per_prompt = []
    for chunks in several:
        images = np.stack(chunks, axis=1)  # [n, K, 64, 64, 3]
        num_prompts, num_noises = images.shape[:2]
        flat = clip.encode_images(images.reshape(-1, *images.shape[2:])).patches
        by_prompt = flat.reshape(num_prompts, num_noises, *flat.shape[1:])  # [n, K, P, W]
        per_prompt.append(metrics.diversity(by_prompt))
    return np.concatenate(per_prompt)


def measure(
    features: PocketFeatures,
    diversity: metrics.Features | None = None,
    num_resamples: int = intervals.NUM_RESAMPLES,
) -> dict[str, Any]:
    """The metrics of images against the teacher's images and real renderings.

    `frechet_distance` is computed in the probe's features, `frechet_distance_clip` in CLIP
    embeddings. `diversity` [M]: of M prompts, see `measure_diversity`.
    """
    # Checks
    metrics.check_features(features.probe, "probe")
    metrics.check_features(features.clip, "CLIP")
    num_images, dimension = features.probe.shape
    warn_if_few_images(num_images, dimension, f"use --count {dimension + 1} or more")

    # Fréchet distances
    probe, probe_real = features.probe, features.probe_real
    clip, clip_real = features.clip, features.clip_real
    patches, patches_real = features.patches, features.patches_real
    results = [
        _frechet_metric("frechet_distance", probe, probe_real, num_resamples),
        _frechet_metric("frechet_distance_clip", clip, clip_real, num_resamples),
        _frechet_metric("patch_frechet_distance", patches, patches_real, num_resamples),
    ]

    # CLIP score
    score = metrics.clip_score(clip, features.texts)
    per_caption = metrics.cosine_similarity(clip, features.texts)
    results.append(Metric("clip_score", score, per_caption))

    # Attributes
    accuracy, accuracy_by_kind = _attribute_accuracy(features.answers)
    results.append(accuracy)

    # Distance to the teacher's images of the same noises
    distance = float(1 - features.patch_similarity.mean())
    per_caption = np.asarray(1 - features.patch_similarity.mean(-1))
    results.append(Metric("same_noise_distance", distance, per_caption))

    # Kernel distances
    value, interval = intervals.bootstrap_kernel(
        metrics.kernel_distances, probe, probe_real, paired=True, num_resamples=num_resamples
    )
    results.append(Metric("kernel_distance", value, interval=interval))
    value, interval = intervals.bootstrap_kernel(
        metrics.cmmds, clip, clip_real, paired=True, num_resamples=num_resamples
    )
    results.append(Metric("cmmd", value, interval=interval))

    # Precision, recall, density, coverage
    if num_images > metrics.NEAREST_DENSITY:
        for name, per_image in vars(metrics.manifold(probe, probe_real)).items():
            results.append(mean_metric(name, per_image))

    # Diversity
    if diversity is not None:
        results.append(mean_metric("diversity", diversity))

    measured = metrics_to_dict(results, num_resamples)
    return measured | {"attribute_accuracy_by_kind": accuracy_by_kind}


def _frechet_metric(
    name: str, a: metrics.Features, b: metrics.Features, num_resamples: int
) -> Metric:
    """The Fréchet distance of `a` and `b` [N, D]; corresponding rows are resampled together."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    value = metrics.frechet_distance(a, b)
    if num_resamples == 0:
        return Metric(name, value)

    def distance_of_rows(rows: intervals.Rows) -> float:
        return metrics.frechet_distance_of_moments(
            metrics.Moments.from_rows(a[rows]), metrics.Moments.from_rows(b[rows])
        )

    interval = intervals.bootstrap(
        distance_of_rows,
        len(a),
        num_resamples=min(num_resamples, intervals.MAX_DISTANCE_RESAMPLES),
        point=value,
    )
    return Metric(name, value, interval=interval)


def _attribute_accuracy(
    answers: Sequence[Mapping[str, Sequence[bool]]],
) -> tuple[Metric, dict[str, float]]:
    """`attribute_accuracy` and the accuracy of each kind, from the answers of each image by kind.

    In the interval, a caption's weight is the number of attributes it states.
    """
    # Collect the answers by kind and by caption
    by_kind: dict[str, list[bool]] = {kind: [] for kind in ATTRIBUTES}
    all_answers: list[bool] = []
    num_correct = np.zeros(len(answers))
    num_stated = np.zeros(len(answers))
    for i, row in enumerate(answers):
        for kind, correct in row.items():
            by_kind[kind].extend(correct)
            num_correct[i] += sum(correct)
            num_stated[i] += len(correct)

    # Accuracies
    for kind_answers in by_kind.values():
        all_answers.extend(kind_answers)
    value = metrics.accuracy(all_answers)
    accuracy_by_kind = {kind: metrics.accuracy(correct) for kind, correct in by_kind.items()}
    return Metric("attribute_accuracy", value, num_correct, num_stated), accuracy_by_kind


def draw_real(indices: range, seed: int) -> Images:
    """[n, 64, 64, 3]: renderings of the held-out captions with these indices."""
    return to_uint8(scenes.draw(indices, HELD_OUT_WORLD + seed).images)


def real_images(count: int, seed: int) -> Images:
    """[count, 64, 64, 3]: renderings of the first held-out captions."""
    starts = range(0, count, CHUNK)
    chunks = [draw_real(range(start, min(start + CHUNK, count)), seed) for start in starts]
    return np.concatenate(chunks)


def iterate_pocket_images(image_sets: Sequence[ImageSet]) -> Iterator[list[Images]]:
    """Yields, of each image set, the images [≤ 64, 64, 64, 3] of the same prompts.

    Raises UserError if an image has another size: this protocol does not resize.
    """
    for chunks in iterate_image_sets(image_sets):
        stacked = []
        for image_set, chunk in zip(image_sets, chunks, strict=True):
            images = []
            for image in chunk:
                check_pocket_size(image, image_set.system.name)
                images.append(image)
            stacked.append(np.stack(images))
        yield stacked


def check_pocket_size(image: Images, name: str) -> None:
    height, width = image.shape[:2]
    if (height, width) != (POCKET.side, POCKET.side):
        raise UserError(
            f"{name} generates {width}×{height} images; the pocket protocol measures "
            f"{POCKET.side}×{POCKET.side} images and does not resize"
        )
