"""The content of `metrics.json`: metrics with their intervals, and the system's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion2gan.evaluate import intervals
from diffusion2gan.evaluate.images import noise_seeds
from diffusion2gan.evaluate.metrics import Features
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.image_folder import ImageFolder
from diffusion2gan.pipelines.system import System

# Images per batch for `images_per_second`; more if the latents are small, as in the pocket world
TIMED_BATCH = 4
TIMED_BATCH_SMALL = 32
SMALL_LATENT = 2**10  # numbers per image


@dataclass(frozen=True)
class Metric:
    """A number of metrics.json, and the data of its bootstrap interval.

    `per_caption` [N]: `value` is their mean, or if `weights` [N] is given Σ per_caption / Σ
    weights; the interval is then computed by resampling captions. `interval`: the interval of a
    metric that is not a mean over captions, such as a distance between two sets. Without either,
    the metric has no interval.
    """

    name: str
    value: float
    per_caption: Features | None = None
    weights: Features | None = None
    interval: intervals.Interval | None = None


def mean_metric(name: str, per_caption: Features) -> Metric:
    """The mean over captions of `per_caption` [N]."""
    return Metric(name, float(per_caption.mean()), per_caption)


def metrics_to_dict(metrics: Sequence[Metric], num_resamples: int) -> dict[str, Any]:
    """Metric name → value.

    With `num_resamples` above 0 also `intervals` (name → [low, high]) and how they were computed.
    """
    result: dict[str, Any] = {metric.name: metric.value for metric in metrics}
    if num_resamples == 0:
        return result

    # Intervals
    found = {}
    for metric in metrics:
        if metric.interval is not None:
            found[metric.name] = list(metric.interval)
        elif metric.per_caption is not None:
            interval = intervals.bootstrap_mean(
                metric.per_caption, metric.weights, num_resamples=num_resamples
            )
            found[metric.name] = list(interval)

    result["intervals"] = found
    result["interval_level"] = intervals.LEVEL
    result["num_resamples"] = num_resamples
    return result


def describe_system(
    system: System | ImageFolder, prompts: Sequence[str], seed: int
) -> dict[str, Any]:
    """A system's settings, and its times per image measured on the first prompts.

    A folder of images has none of these: only the key of its contents and its file formats.
    """
    if isinstance(system, ImageFolder):
        return {"weights": system.key, "picture_format": "+".join(system.formats)}

    # Times per image
    is_small = np.prod(system.latent_shape) <= SMALL_LATENT
    batch_size = min(TIMED_BATCH_SMALL if is_small else TIMED_BATCH, len(prompts))
    noise = noise_from_seeds(noise_seeds(seed, range(batch_size)), system.latent_shape)
    timings = system.timings(prompts[:batch_size], noise)

    return {
        **timings,
        "num_inference_steps": system.num_inference_steps,
        "guidance_scale": system.guidance_scale,
        "scheduler": type(system.pipeline.scheduler).__name__,
        "dtype": system.precision,
        "device": system.device,
        "weights": system.revision,
        "picture_format": "uint8, never compressed",
    }
