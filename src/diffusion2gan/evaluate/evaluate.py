"""`diffusion2gan evaluate`: a system's pictures of the pocket world's held-out captions, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import from_numpy

from diffusion2gan.errors import UserError
from diffusion2gan.evaluate.features import PocketClip, attributes_right, load_probe, probe_features, probe_sha256
from diffusion2gan.evaluate.metrics import clip_score, frechet_distance, same_noise_distance, share
from diffusion2gan.evaluate.systems import System, load_system
from diffusion2gan.pairs.store import noise_of, pair_seed
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import write_json
from diffusion2gan.runtime.images import to_uint8
from diffusion2gan.runtime.progress import Bar

HELD_OUT_WORLD = 1000  # + seed: captions and pictures that no training stage has seen
NOISE_SET = 128  # + seed: noises that no set of pairs with a seed below 128 has
CHUNK = 64


def evaluate(
    name: str, *, count: int, seed: int, cache: Path, num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All metrics of system `name` on `count` held-out captions; pictures are kept in `cache` and reused.

    Raises UserError where the system's pictures are not of the pocket world's size.
    """
    if count < 2:
        raise UserError(f"--count {count}: at least 2 pictures are needed")
    if not 0 <= seed < NOISE_SET:
        raise UserError(f"--seed {seed}: 0 to {NOISE_SET - 1}")
    system = load_system(name, num_inference_steps, guidance_scale)
    teacher = load_system("pocket-teacher")
    prompts = scenes.captions(range(count), HELD_OUT_WORLD + seed)
    pictures = render(system, prompts, seed, cache)
    reference = pictures if system.key == teacher.key else render(teacher, prompts, seed, cache)
    few = min(32, count)
    noise = noise_of([pair_seed(NOISE_SET + seed, i) for i in range(few)], system.latent_shape)
    return {
        "system": name,
        **measure(pictures, reference, real_pictures(count, seed), prompts),
        **system.timings(prompts[:few], noise),
        "num_inference_steps": system.num_inference_steps,
        "guidance_scale": system.guidance_scale,
        "count": count,
        "seed": seed,
        "weights": system.revision,
    }


def measure(
    pictures: NDArray[np.uint8], reference: NDArray[np.uint8], real: NDArray[np.uint8], prompts: Sequence[str]
) -> dict[str, Any]:
    """The metrics of `pictures` [N, 64, 64, 3] against the teacher's (`reference`) and real renderings (`real`).

    `frechet_distance` is taken in the probe's features, `frechet_distance_clip` in the CLIP's embeddings.
    """
    clip, probe = PocketClip(), load_probe()
    ours, theirs, truth = clip.images(pictures), clip.images(reference), clip.images(real)
    right = attributes_right(probe, pictures, prompts)
    return {
        "frechet_distance": frechet_distance(probe_features(probe, pictures), probe_features(probe, real)),
        "frechet_distance_clip": frechet_distance(ours.image_embeds, truth.image_embeds),
        "clip_score": clip_score(ours.image_embeds, clip.texts(prompts)),
        "attribute_accuracy": share([answer for answers in right.values() for answer in answers]),
        "attribute_accuracy_by_kind": {kind: share(answers) for kind, answers in right.items()},
        "same_noise_distance": same_noise_distance(ours.patches, theirs.patches),
        "clip_weights_sha256": clip.sha256,
        "probe_weights_sha256": probe_sha256(),
    }


def real_pictures(count: int, seed: int) -> NDArray[np.uint8]:
    """[count, 64, 64, 3] renderings of the held-out captions themselves."""
    parts = [
        to_uint8(scenes.draw(range(start, min(start + CHUNK, count)), HELD_OUT_WORLD + seed).images)
        for start in range(0, count, CHUNK)
    ]
    return np.concatenate(parts)


def render(system: System, prompts: Sequence[str], seed: int, cache: Path) -> NDArray[np.uint8]:
    """[N, 64, 64, 3] pictures of the held-out prompts; each chunk is kept in `cache` and not made twice."""
    parts = []
    with Bar(f"pictures of {system.name}", len(prompts)) as bar:
        for start in range(0, len(prompts), CHUNK):
            some = prompts[start : start + CHUNK]
            path = cache / f"{system.key}-{seed}" / f"{start:06d}-{len(some)}.safetensors"
            if not path.exists():
                seeds = [pair_seed(NOISE_SET + seed, start + i) for i in range(len(some))]
                made = system.generate(some, noise_of(seeds, system.latent_shape))
                checkpoint.save(path, {"pictures": from_numpy(made)}, {"prompts": list(some)})
            parts.append(checkpoint.load(path)[0]["pictures"].numpy())
            bar.advance(len(some))
    pictures = np.concatenate(parts)
    if pictures.shape[1:3] != (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE):
        raise UserError(
            f"{system.name} makes {pictures.shape[2]}×{pictures.shape[1]} pictures; the pocket protocol measures "
            f"{scenes.IMAGE_SIZE}×{scenes.IMAGE_SIZE} ones"
        )
    return pictures


def save_metrics(path: Path, metrics: dict[str, Any]) -> None:
    write_json(path, metrics)
