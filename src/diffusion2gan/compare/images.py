"""The images of several systems for the same prompts and noise, stored on disk once generated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor, from_numpy

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pipelines.image_folder import ImageFolder, open_system
from diffusion2gan.pipelines.system import System
from diffusion2gan.runtime.cache import load_or_compute
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.teacher.pipeline import warn_truncated

BATCH_SIZE = 16


def generate_images(
    systems: Mapping[str, System | ImageFolder],
    prompts: Sequence[str],
    seed: int,
    cache: Path,
    label: str = "compare",
) -> dict[str, list[Image.Image]]:
    """Generates one image per prompt with every system; returns them by system name.

    The noise of image i depends only on `seed` and i. A folder of images generates nothing: its
    image i belongs to prompt i. Each finished batch is stored in `cache` and not generated again;
    its file name depends on the system, its settings, the prompts and the seed. `label` is shown
    beside the progress bar.
    """
    # An incomplete folder of images is reported before anything slow starts
    for system in systems.values():
        if isinstance(system, ImageFolder):
            system.check(range(len(prompts)))

    warned = False
    images: dict[str, list[Image.Image]] = {}
    with Bar(label, len(systems) * len(prompts)) as bar:
        for name, system in systems.items():
            # Truncated prompts are reported once, not once per system
            if isinstance(system, System) and not warned:
                warned = warn_truncated(system.tokenizer, prompts, system.num_tokens)

            images[name] = []
            for start in range(0, len(prompts), BATCH_SIZE):
                batch = prompts[start : start + BATCH_SIZE]
                indices = range(start, start + len(batch))
                if isinstance(system, ImageFolder):
                    arrays = system.read(indices)
                    images[name] += [Image.fromarray(pixels) for pixels in arrays]
                else:
                    images[name] += _generate_batch(system, batch, indices, seed, cache)
                bar.advance(len(batch))
    return images


def _generate_batch(
    system: System, prompts: Sequence[str], indices: range, seed: int, cache: Path
) -> list[Image.Image]:
    """Generates the images of `prompts`, or loads them if they are in `cache`."""
    seeds = [pair_seed(seed, index) for index in indices]
    path = cache / system.key / f"{short_digest(prompts)}-{seeds[0]}.safetensors"

    def generate() -> dict[str, Tensor]:
        noise = noise_from_seeds(seeds, system.latent_shape)
        return {"pictures": from_numpy(system.generate(prompts, noise))}

    tensors = load_or_compute(path, {"prompts": list(prompts)}, generate)
    return [Image.fromarray(pixels) for pixels in tensors["pictures"].numpy()]


def short_digest(texts: Sequence[str]) -> str:
    """A digest of a list of texts: 16 hex digits, for file names."""
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(joined).hexdigest()[:16]


def parse_names(arguments: Sequence[str], option: str) -> dict[str, str]:
    """Parses `NAME=PATH` … into {name: path}.

    `option` is named in errors. Raises UserError if "=" is missing or a name repeats.
    """
    paths: dict[str, str] = {}
    for argument in arguments:
        # Only the first "=": the path may have another, as ROW=FOLDER has
        name, equals, path = argument.partition("=")
        if not equals or not name or not path:
            raise UserError(
                f"{option} {argument!r}: write it as NAME=PATH, for example student=export/student"
            )

        if name in paths:
            raise UserError(
                f"{option} {name}: this name is given twice; every column needs a different name"
            )
        paths[name] = path
    return paths


def parse_systems(
    arguments: Sequence[str], device: str = "cpu", precision: str = "float32"
) -> dict[str, System | ImageFolder]:
    """Parses and loads `NAME=PATH` or `NAME=PATH@STEPS` …; returns the systems by name.

    Raises UserError if there are none, if "=" is missing or if a name repeats.
    """
    paths = parse_names(arguments, "--system")
    if not paths:
        raise UserError("no --system is given; name at least one as NAME=PATH")
    return {name: parse_system(path, device, precision) for name, path in paths.items()}


def parse_system(
    path: str, device: str = "cpu", precision: str = "float32", resolution: int | None = None
) -> System | ImageFolder:
    """Loads a system from its path or ROW=FOLDER, with `…@STEPS` for a number of steps.

    A path to a folder of images opens that instead. `resolution` as in `load_system`.
    """
    # A suffix @STEPS, unless it is part of the folder's name
    base, at, suffix = path.rpartition("@")
    num_inference_steps = None
    if at and suffix.isdecimal() and int(suffix) > 0 and not Path(path).exists():
        path = base
        num_inference_steps = int(suffix)
    return open_system(
        path, num_inference_steps, device=device, precision=precision, resolution=resolution
    )
