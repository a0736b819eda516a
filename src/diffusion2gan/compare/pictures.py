"""The pictures of several systems, of the same prompts and noises; kept on disk as they are made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import from_numpy

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pipelines.image_folder import ImageFolder, open_system
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.pipeline import warn_truncated

BATCH = 16


def make_pictures(
    systems: Mapping[str, System | ImageFolder],
    prompts: Sequence[str],
    seed: int,
    cache: Path,
    what: str = "compare",
) -> dict[str, list[Image.Image]]:
    """One picture a prompt of every system, by name. Picture i's noise depends on `seed` and i alone.

    Of a folder of pictures, picture i is prompt i's. Each batch is kept in `cache` and not made twice; another system,
    setting, prompt or seed has another place there.
    """
    told = False
    for system in systems.values():
        if isinstance(system, ImageFolder):
            system.check(range(len(prompts)))
    pictures: dict[str, list[Image.Image]] = {}
    with Bar(what, len(systems) * len(prompts)) as bar:
        for name, system in systems.items():
            told = told or (
                isinstance(system, System)
                and warn_truncated(system.tokenizer, prompts, system.num_tokens)
            )
            pictures[name] = []
            for start in range(0, len(prompts), BATCH):
                made = _batch(
                    system, prompts[start : start + BATCH], range(start, start + BATCH), seed, cache
                )
                pictures[name] += made
                bar.advance(len(made))
    return pictures


def _batch(
    system: System | ImageFolder, prompts: Sequence[str], indices: range, seed: int, cache: Path
) -> list[Image.Image]:
    if isinstance(system, ImageFolder):
        return [Image.fromarray(picture) for picture in system.read(indices[: len(prompts)])]
    seeds = [pair_seed(seed, i) for i, _ in zip(indices, prompts, strict=False)]
    path = cache / system.key / f"{digest(prompts)}-{seeds[0]}.safetensors"
    if not path.exists():
        made = system.generate(prompts, noise_from_seeds(seeds, system.latent_shape))
        checkpoint.save(path, {"pictures": from_numpy(made)}, {"prompts": list(prompts)})
    return [Image.fromarray(picture) for picture in checkpoint.load(path)[0]["pictures"].numpy()]


def digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def parse_names(texts: Sequence[str], option: str) -> dict[str, str]:
    """`NAME=PATH` … → {name: path}. Raises UserError at a missing "=" or a name given twice."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UserError(
                f"{option} {text!r}: write it as NAME=PATH, such as student=export/student"
            )
        if name in named:
            raise UserError(f"{option} {name}: given twice; every column needs its own name")
        named[name] = path
    return named


def parse_systems(
    texts: Sequence[str], device: str = "cpu", precision: str = "float32"
) -> dict[str, System | ImageFolder]:
    """`NAME=PATH` or `NAME=PATH@STEPS` … → systems. Raises UserError as `parse_names` does, or with none at all."""
    named = parse_names(texts, "--system")
    if not named:
        raise UserError("no --system given; name at least one as NAME=PATH")
    return {name: system_of(path, device, precision) for name, path in named.items()}


def system_of(
    path: str, device: str = "cpu", precision: str = "float32", resolution: int | None = None
) -> System | ImageFolder:
    """A system by its path or as ROW=FOLDER, `…@STEPS` for that many steps; or a folder of pictures.

    `resolution` as in `load_system`.
    """
    base, at, steps = path.rpartition("@")
    if at and steps.isdecimal() and int(steps) > 0 and not Path(path).exists():
        return open_system(
            base, int(steps), device=device, precision=precision, resolution=resolution
        )
    return open_system(path, device=device, precision=precision, resolution=resolution)
