"""`diffusion2gan evaluate`: a system's pictures of the pocket world's held-out captions, in numbers.

The keys of `metrics.json` are listed in ARCHITECTURE.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate import backbones, intervals, metrics
from diffusion2gan.evaluate.coco import evaluate_coco
from diffusion2gan.evaluate.features import (
    ClipFeatures,
    PocketClip,
    attributes_of_each,
    load_probe,
    probe_features,
    probe_sha256,
)
from diffusion2gan.evaluate.pictures import (
    CHUNK,
    MAX_DIVERSITY,
    MAX_NOISES,
    NOISE_SET,
    chunks,
    make_by_ranks,
    middle,
    noise_seeds,
    warn_few,
)
from diffusion2gan.evaluate.protocols import POCKET, describe, get_protocol, read_captions
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.image_folder import ImageFolder, open_system
from diffusion2gan.pipelines.system import System, load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.distributed import get_ranks, rank_device, resolve_device
from diffusion2gan.runtime.files import write_json
from diffusion2gan.runtime.images import to_uint8

HELD_OUT_WORLD = 1000  # + seed: captions and pictures that no training stage has seen
PATCH = scenes.IMAGE_SIZE // 2  # pixels

Pictures = NDArray[np.uint8]


def evaluate(
    name: str,
    *,
    count: int,
    seed: int,
    cache: Path,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_noises: int = 1,
    num_resamples: int = intervals.NUM_RESAMPLES,
) -> dict[str, Any]:
    """All metrics of system `name` on `count` held-out captions; pictures are kept in `cache` and reused.

    `name` may be a folder of pictures by caption index. With `num_noises` above 1 the first 256 captions get so many
    pictures each, and `diversity` is told too. `num_resamples` = 0 leaves the intervals out. Under torchrun the ranks
    share the pictures, and all but the first then return nothing. Raises UserError where the system's pictures are not
    of the pocket world's size.
    """
    if count < 2:
        raise UserError(f"--count {count}: at least 2 pictures are needed")
    if not 0 <= seed < NOISE_SET:
        raise UserError(f"--seed {seed}: 0 to {NOISE_SET - 1}")
    system = open_system(name, num_inference_steps, guidance_scale)
    _check_noises(system, num_noises)
    teacher = load_system("pocket-teacher")
    prompts = scenes.captions(range(count), HELD_OUT_WORLD + seed)
    more = [(system, prompts[:MAX_DIVERSITY], nth) for nth in range(1, num_noises)]
    if not make_by_ranks([(system, prompts, 0), (teacher, prompts, 0), *more], seed, cache):
        return {}
    pictures = render(system, prompts, seed, cache)
    reference = pictures if system.key == teacher.key else render(teacher, prompts, seed, cache)
    several = (
        render_several(system, prompts[:MAX_DIVERSITY], seed, cache, num_noises)
        if num_noises > 1
        else None
    )
    measured = measure(
        pictures,
        reference,
        real_pictures(count, seed),
        prompts,
        several=several,
        num_resamples=num_resamples,
    )
    return {
        "system": name,
        **measured,
        **_settings(system, prompts, seed),
        "count": count,
        "seed": seed,
    } | describe(
        POCKET, captions=prompts, seed=seed, weights={key: measured[key] for key in WEIGHTS}
    )


def evaluate_published(
    name: str,
    protocol: str,
    *,
    captions: Path,
    reference: Path,
    cache: Path,
    captions_sha256: str | None = None,
    inception: Path | None = None,
    clip: str | None = None,
    dinov2: str | None = None,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    device: str = "cpu",
    precision: str = "float32",
    batch_size: int = 1,
    num_resamples: int = intervals.NUM_RESAMPLES,
    teacher: str | None = None,
    num_noises: int = 1,
) -> dict[str, Any]:
    """A system's numbers by a COCO protocol; see `coco.evaluate_coco` for what each feature network tells.

    Under torchrun the ranks share the pictures, each on its own GPU, and all but the first then return nothing. Raises
    UserError at an unknown protocol, another captions list, or files that are missing.
    """
    chosen = get_protocol(protocol)
    if chosen.count is None:
        raise UserError(
            f"--protocol {protocol} makes its own captions; evaluate it without --captions"
        )
    prompts = read_captions(captions, chosen.count, captions_sha256)
    device = device if get_ranks().is_main else rank_device(device)
    resolve_device(device, "give --device cpu")
    spaces = {
        "inception": backbones.inception(inception, device=device) if inception else None,
        "clip": backbones.clip(clip, device) if clip else None,
        "dinov2": backbones.dinov2(dinov2, device) if dinov2 else None,
    }
    system = open_system(name, num_inference_steps, guidance_scale, device, precision)
    _check_noises(system, num_noises)
    taught = open_system(teacher, device=device, precision=precision) if teacher else None
    more = [(system, prompts[:MAX_DIVERSITY], nth) for nth in range(1, num_noises)]
    orders = [(system, prompts, 0), *([(taught, prompts, 0)] if taught else []), *more]
    if not make_by_ranks(orders, seed, cache, batch_size):
        return {}
    measured = evaluate_coco(
        system,
        chosen,
        prompts,
        reference,
        cache,
        seed=seed,
        batch_size=batch_size,
        num_resamples=num_resamples,
        teacher=taught,
        num_noises=num_noises,
        **spaces,  # type: ignore[arg-type]
    )
    return measured | _settings(system, prompts, seed)


WEIGHTS = ("clip_weights_sha256", "probe_weights_sha256")


def _check_noises(system: System | ImageFolder, num_noises: int) -> None:
    if not 1 <= num_noises <= MAX_NOISES:
        raise UserError(f"--num-noises {num_noises}: 1 to {MAX_NOISES}")
    if num_noises > 1 and isinstance(system, ImageFolder):
        raise UserError(
            f"{system.name} is a folder with one picture a caption; leave --num-noises out"
        )


def _settings(system: System | ImageFolder, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    if isinstance(system, ImageFolder):
        return {"weights": system.key, "picture_format": "+".join(system.formats)}
    few = min(32 if np.prod(system.latent_shape) <= 2**10 else 4, len(prompts))
    noise = noise_from_seeds(noise_seeds(seed, range(few)), system.latent_shape)
    return {
        **system.timings(prompts[:few], noise),
        "num_inference_steps": system.num_inference_steps,
        "guidance_scale": system.guidance_scale,
        "scheduler": type(system.pipeline.scheduler).__name__,
        "dtype": system.precision,
        "device": system.device,
        "weights": system.revision,
        "picture_format": "uint8, never compressed",
    }


def measure(
    pictures: Pictures,
    reference: Pictures,
    real: Pictures,
    prompts: Sequence[str],
    *,
    several: Pictures | None = None,
    num_resamples: int = intervals.NUM_RESAMPLES,
) -> dict[str, Any]:
    """The metrics of `pictures` [N, 64, 64, 3] against the teacher's (`reference`) and real renderings (`real`).

    `frechet_distance` is taken in the probe's features, `frechet_distance_clip` in the CLIP's embeddings. `several`
    [M, K, 64, 64, 3]: K pictures of each of M prompts.
    """
    clip, probe = PocketClip(), load_probe()
    ours, theirs, truth = clip.images(pictures), clip.images(reference), clip.images(real)
    patches = [
        probe_features(probe, np.ascontiguousarray(middle(x, PATCH))) for x in (pictures, real)
    ]
    pairs = {
        "frechet_distance": (probe_features(probe, pictures), probe_features(probe, real)),
        "frechet_distance_clip": (ours.image_embeds, truth.image_embeds),
        "patch_frechet_distance": (patches[0], patches[1]),
    }
    seen, there = pairs["frechet_distance"]
    metrics.check_features(seen, "probe")
    metrics.check_features(ours.image_embeds, "CLIP")
    warn_few(len(pictures), seen.shape[1], f"take --count {seen.shape[1] + 1} or more")
    right, by_caption = _attributes(attributes_of_each(probe, pictures, prompts))
    texts = clip.texts(prompts)
    told: dict[str, Any] = {
        **{key: metrics.frechet_distance(a, b) for key, (a, b) in pairs.items()},
        "clip_score": metrics.clip_score(ours.image_embeds, texts),
        **right,
        "same_noise_distance": metrics.same_noise_distance(ours.patches, theirs.patches),
    }
    kernels = {
        "kernel_distance": (metrics.kernel_distances, seen, there),
        "cmmd": (metrics.cmmds, ours.image_embeds, truth.image_embeds),
    }
    numbers, spans = intervals.of_kernels(kernels, paired=True, num_resamples=num_resamples)
    told |= numbers
    by_caption["clip_score"] = (metrics.cosine(ours.image_embeds, texts), None)
    by_caption["same_noise_distance"] = (metrics.patch_distance(ours.patches, theirs.patches), None)
    if len(pictures) > metrics.NEAREST_DENSITY:
        found = vars(metrics.manifold(seen, there))
        told |= {key: float(values.mean()) for key, values in found.items()}
        by_caption |= {key: (values, None) for key, values in found.items()}
    if several is not None:
        spread = metrics.diversity(_patches_of(clip, several))
        told |= {
            "diversity": float(spread.mean()),
            "diversity_count": len(several),
            "num_noises": several.shape[1],
        }
        by_caption["diversity"] = (spread, None)
    if num_resamples:
        told |= intervals_of(pairs, by_caption, spans, num_resamples)
    return told | {"clip_weights_sha256": clip.sha256, "probe_weights_sha256": probe_sha256()}


def _attributes(
    rows: list[dict[str, list[bool]]],
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """(the shares of right answers, and of each caption how many are right of how many)."""
    answers = {kind: [answer for row in rows for answer in row[kind]] for kind in rows[0]}
    told = {
        "attribute_accuracy": metrics.share(
            [answer for some in answers.values() for answer in some]
        ),
        "attribute_accuracy_by_kind": {kind: metrics.share(some) for kind, some in answers.items()},
    }
    right = [sum(sum(some) for some in row.values()) for row in rows]
    asked = [sum(len(some) for some in row.values()) for row in rows]
    return told, {"attribute_accuracy": (right, asked)}


def intervals_of(
    pairs: dict[str, tuple[metrics.Features, metrics.Features]],
    by_caption: dict[str, tuple[Any, Any]],
    found: dict[str, intervals.Interval],
    num_resamples: int,
) -> dict[str, Any]:
    """`intervals`: name → [low, high] of Fréchet distances between `pairs`, of means over captions, and `found`."""

    def distance(a: metrics.Features, b: metrics.Features) -> intervals.Interval:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        point = metrics.frechet_distance(a, b)
        return intervals.bootstrap(
            lambda rows: metrics.frechet_distance_of_moments(
                metrics.Moments.of(a[rows]), metrics.Moments.of(b[rows])
            ),
            len(a),
            num_resamples=min(num_resamples, intervals.MAX_DISTANCE_RESAMPLES),
            point=point,
        )

    found = {key: distance(a, b) for key, (a, b) in pairs.items()} | found
    for key, (values, weights) in by_caption.items():
        found[key] = intervals.bootstrap_mean(values, weights, num_resamples=num_resamples)
    return {
        "intervals": {key: list(interval) for key, interval in found.items()},
        "interval_level": intervals.LEVEL,
        "num_resamples": num_resamples,
    }


def _patches_of(clip: PocketClip, several: Pictures) -> metrics.Features:
    """[M, K, P, W] of [M, K, 64, 64, 3]."""
    num, each = several.shape[:2]
    found: ClipFeatures = clip.images(several.reshape(num * each, *several.shape[2:]))
    return found.patches.reshape(num, each, *found.patches.shape[1:])


def real_pictures(count: int, seed: int) -> Pictures:
    """[count, 64, 64, 3] renderings of the held-out captions themselves."""
    parts = [
        to_uint8(scenes.draw(range(start, min(start + CHUNK, count)), HELD_OUT_WORLD + seed).images)
        for start in range(0, count, CHUNK)
    ]
    return np.concatenate(parts)


def render(
    system: System | ImageFolder, prompts: Sequence[str], seed: int, cache: Path, nth: int = 0
) -> Pictures:
    """[N, 64, 64, 3] pictures of the held-out prompts, each from its `nth` noise.

    Raises UserError where they are of another size: the pocket protocol resizes nothing.
    """
    pictures = render_any(system, prompts, seed, cache, nth)
    for picture in pictures:
        if picture.shape[:2] != (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE):
            raise UserError(
                f"{system.name} makes {picture.shape[1]}×{picture.shape[0]} pictures; the pocket protocol measures "
                f"{scenes.IMAGE_SIZE}×{scenes.IMAGE_SIZE} ones"
            )
    return np.stack(pictures)


def render_any(
    system: System | ImageFolder, prompts: Sequence[str], seed: int, cache: Path, nth: int = 0
) -> list[Pictures]:
    """[H, W, 3] of each prompt, of any size."""
    return [picture for some in chunks(system, prompts, seed, cache, nth=nth) for picture in some]


def render_several(
    system: System | ImageFolder, prompts: Sequence[str], seed: int, cache: Path, num_noises: int
) -> Pictures:
    """[N, K, 64, 64, 3]: K pictures of each prompt, from noises of their own."""
    return np.stack(
        [render(system, prompts, seed, cache, nth) for nth in range(num_noises)], axis=1
    )


def save_metrics(path: Path, metrics: dict[str, Any]) -> None:
    write_json(path, metrics)
