"""The pocket protocol: images of the pocket world's held-out captions.

References are the teacher's images of the same noises, and renderings of the same captions. The
feature networks run on the CPU in float32 whatever the systems' device, so that the same images
have the same metrics everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import intervals, metrics
from diffusion2gan.evaluate.features import (
    ATTRIBUTES,
    PocketClip,
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
    collect_images,
    diversity_image_sets,
    generate_on_all_ranks,
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

    # On rank 0 all images are now in the cache or generated
    images = collect_pocket_images(image_set)
    teacher_images = images
    if system.key != teacher.key:
        teacher_images = collect_pocket_images(teacher_set)
    several = None
    if settings.num_noises > 1:
        several = np.stack([collect_pocket_images(s) for s in diversity_sets], axis=1)

    # Metrics, and the settings and weights that they were measured with
    result: dict[str, Any] = {"system": settings.system}
    result |= measure(
        images,
        teacher_images,
        real_images(count, seed),
        prompts,
        several=several,
        num_resamples=settings.num_resamples,
    )
    weights = {key: result[key] for key in ("clip_weights_sha256", "probe_weights_sha256")}
    result |= describe_system(system, prompts, seed)
    result |= {"count": count, "seed": seed}
    result |= describe_protocol(POCKET, captions=prompts, seed=seed, weights=weights)
    return result


def measure(
    images: Images,
    teacher_images: Images,
    real: Images,
    prompts: Sequence[str],
    *,
    several: Images | None = None,
    num_resamples: int = intervals.NUM_RESAMPLES,
) -> dict[str, Any]:
    """The metrics of `images` [N, 64, 64, 3] against the teacher's images and real renderings.

    `frechet_distance` is computed in the probe's features, `frechet_distance_clip` in CLIP
    embeddings. `several` [M, K, 64, 64, 3]: K images of each of M prompts, for the diversity.
    """
    # Features
    clip = PocketClip()
    probe = load_probe()
    clip_features = clip.encode_images(images)
    clip_teacher = clip.encode_images(teacher_images)
    clip_real = clip.encode_images(real)
    text_embeds = clip.encode_texts(prompts)
    features = probe_features(probe, images)
    features_real = probe_features(probe, real)
    patches = probe_features(probe, np.ascontiguousarray(centre_crop(images, POCKET.patch)))
    patches_real = probe_features(probe, np.ascontiguousarray(centre_crop(real, POCKET.patch)))

    # Checks
    metrics.check_features(features, "probe")
    metrics.check_features(clip_features.image_embeds, "CLIP")
    dimension = features.shape[1]
    warn_if_few_images(len(images), dimension, f"use --count {dimension + 1} or more")

    # Fréchet distances
    embeds = clip_features.image_embeds
    embeds_real = clip_real.image_embeds
    results = [
        _frechet_metric("frechet_distance", features, features_real, num_resamples),
        _frechet_metric("frechet_distance_clip", embeds, embeds_real, num_resamples),
        _frechet_metric("patch_frechet_distance", patches, patches_real, num_resamples),
    ]

    # CLIP score
    score = metrics.clip_score(embeds, text_embeds)
    per_caption = metrics.cosine_similarity(embeds, text_embeds)
    results.append(Metric("clip_score", score, per_caption))

    # Attributes
    answers = score_attributes_per_image(probe, images, prompts)
    accuracy, accuracy_by_kind = _attribute_accuracy(answers)
    results.append(accuracy)
    extra: dict[str, Any] = {"attribute_accuracy_by_kind": accuracy_by_kind}

    # Distance to the teacher's images of the same noises
    distance = metrics.same_noise_distance(clip_features.patches, clip_teacher.patches)
    per_caption = metrics.patch_distance(clip_features.patches, clip_teacher.patches)
    results.append(Metric("same_noise_distance", distance, per_caption))

    # Kernel distances
    value, interval = intervals.bootstrap_kernel(
        metrics.kernel_distances, features, features_real, paired=True, num_resamples=num_resamples
    )
    results.append(Metric("kernel_distance", value, interval=interval))
    value, interval = intervals.bootstrap_kernel(
        metrics.cmmds, embeds, embeds_real, paired=True, num_resamples=num_resamples
    )
    results.append(Metric("cmmd", value, interval=interval))

    # Precision, recall, density, coverage
    if len(images) > metrics.NEAREST_DENSITY:
        for name, per_image in vars(metrics.manifold(features, features_real)).items():
            results.append(mean_metric(name, per_image))

    # Diversity
    if several is not None:
        num_prompts, num_noises = several.shape[:2]
        flat = clip.encode_images(several.reshape(-1, *several.shape[2:])).patches
        by_prompt = flat.reshape(num_prompts, num_noises, *flat.shape[1:])  # [M, K, P, W]
        results.append(mean_metric("diversity", metrics.diversity(by_prompt)))
        extra |= {"diversity_count": num_prompts, "num_noises": num_noises}

    extra |= {"clip_weights_sha256": clip.sha256, "probe_weights_sha256": probe_sha256()}
    return metrics_to_dict(results, num_resamples) | extra


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


def real_images(count: int, seed: int) -> Images:
    """[count, 64, 64, 3]: renderings of the held-out captions themselves."""
    chunks = []
    for start in range(0, count, CHUNK):
        indices = range(start, min(start + CHUNK, count))
        chunks.append(to_uint8(scenes.draw(indices, HELD_OUT_WORLD + seed).images))
    return np.concatenate(chunks)


def collect_pocket_images(image_set: ImageSet) -> Images:
    """[N, 64, 64, 3]: one image per prompt.

    Raises UserError if an image has another size: this protocol does not resize.
    """
    images = collect_images(image_set)
    for image in images:
        height, width = image.shape[:2]
        if (height, width) != (POCKET.side, POCKET.side):
            raise UserError(
                f"{image_set.system.name} generates {width}×{height} images; the pocket protocol "
                f"measures {POCKET.side}×{POCKET.side} images and does not resize"
            )
    return np.stack(images)
