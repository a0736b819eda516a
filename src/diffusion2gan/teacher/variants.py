"""Teachers that are not a plain pipeline folder: a single file, merged LoRAs, another VAE."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import diffusers

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import read_json, sha256
from diffusion2gan.teacher import autoencoder, strict_loading
from diffusion2gan.teacher.families import FAMILIES

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def is_single_file(name: str) -> bool:
    """Whether `name` is a .safetensors file. Raises UserError if it is a pickle.

    Loading a pickle can run code that is stored in it.
    """
    if name.endswith(PICKLE_SUFFIXES):
        converted = Path(name).with_suffix(".safetensors")
        raise UserError(
            f"{name} is a pickle, which can run code when it is loaded, so it is refused. If you "
            "trust it, convert it once: "
            'python -c "import sys, torch; from safetensors.torch import save_file; '
            "d = torch.load(sys.argv[1], weights_only=True); d = d.get('state_dict', d); "
            "save_file({k: v.contiguous() for k, v in d.items() if hasattr(v, 'shape')}, "
            f'sys.argv[2])" {name} {converted}'
        )
    return name.endswith(".safetensors")


def load_single_file(file: Path, config: Path | None, pipeline_class: str | None) -> Any:
    """Loads a pipeline in float32 from one .safetensors file.

    `config` is the folder of a pipeline of the same class, `pipeline_class`. A UNet model's file
    contains all weights, and the folder gives only configs and tokenizers. A transformer model's
    file contains the transformer, and all else comes from the folder. Raises UserError if one is
    missing or they do not fit each other.
    """
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    if config is None or pipeline_class is None:
        raise UserError(
            f"{file} contains only weights. Also name a pipeline folder of the same kind of model, "
            "from which configs, scheduler and tokenizers are read: --teacher-config FOLDER, or "
            "teacher_config=FOLDER in a recipe."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = f"does not load as the {pipeline_class} that {config} describes"
        with strict_loading.translated_errors(str(file), problem):
            if FAMILIES[pipeline_class].network == "unet":
                return _load_unet_file(file, config, pipeline_class)
            return _load_transformer_file(file, config, pipeline_class)


def _load_unet_file(file: Path, config: Path, pipeline_class: str) -> Any:
    options: dict[str, Any] = {}
    if pipeline_class == "StableDiffusionPipeline":
        options["safety_checker"] = None
    kind: Any = getattr(diffusers, pipeline_class)
    return strict_loading.load_single_file(kind, file, config=str(config), **options)


def _load_transformer_file(file: Path, config: Path, pipeline_class: str) -> Any:
    # The transformer, of the class that the folder's config names
    transformer_config = read_json(config / "transformer" / "config.json")
    transformer_class: Any = getattr(diffusers, transformer_config["_class_name"])
    strict_loading.check_file_in_own_format(transformer_class, file, transformer_config)
    transformer = strict_loading.load_single_file(
        transformer_class, file, config=str(config), subfolder="transformer"
    )

    # The pipeline around it
    components: dict[str, Any] = {"transformer": transformer}
    has_third_encoder = (config / "text_encoder_3").is_dir()
    if pipeline_class == "StableDiffusion3Pipeline" and not has_third_encoder:
        components["text_encoder_3"] = None
        components["tokenizer_3"] = None
    kind: Any = getattr(diffusers, pipeline_class)
    return strict_loading.load_pipeline(kind, config, components)


def merge_loras(pipeline: Any, loras: str) -> None:
    """Merges LoRAs permanently into a pipeline's weights: `PATH[@SCALE]`, separated by commas.

    Raises UserError if peft is not installed, or if a LoRA does not exist or does not fit.
    """
    _require_peft()
    kind = type(pipeline).__name__
    for text in loras.split(","):
        path, scale = parse_lora(text)

        # Load it as an adapter. A LoRA without any matching layer adds no adapter or raises.
        adapters_before = _count_adapters(pipeline)
        try:
            strict_loading.load_lora(
                pipeline, path, str(path), adapter_name="merged", local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = strict_loading.describe_error(error)
            raise UserError(
                f"the LoRA {path} does not fit this teacher's {kind} ({reason}); it "
                "was made for another base model."
            ) from error
        if _count_adapters(pipeline) == adapters_before:
            raise UserError(
                f"the LoRA {path} has no layer of this teacher's {kind}; it was made for another "
                "base model."
            )

        # Merge it into the weights
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()


def _require_peft() -> None:
    """Raises UserError if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            "a teacher with a LoRA needs peft: pip install 'diffusion2gan[lora]'"
        ) from error


def _count_adapters(pipeline: Any) -> dict[str, int]:
    """Number of LoRA adapters per component."""
    return {name: len(adapters) for name, adapters in pipeline.get_list_adapters().items()}


def parse_lora(text: str) -> tuple[Path, float]:
    """`PATH[@SCALE]` → path and scale, 1 by default.

    Raises UserError if the scale is not a number or the file does not exist.
    """
    path, at, scale = text.strip().rpartition("@")
    if not at:
        path = text.strip()
        scale = "1"
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"the LoRA {text!r}: the text after @ must be a number, its scale, not {scale!r}"
        )
    is_single_file(path)  # refuses pickles
    if not Path(path).exists():
        raise UserError(f"no such LoRA: {path}")
    return Path(path), number


def replace_vae(pipeline: Any, name: str) -> None:
    """Replaces a pipeline's VAE. Raises UserError if the new VAE's latents differ in shape."""
    vae = autoencoder.load_vae(name, pipeline.device)
    channels = autoencoder.num_latent_channels(pipeline.vae)
    factor = autoencoder.spatial_factor(pipeline.vae)
    new_channels = autoencoder.num_latent_channels(vae)
    new_factor = autoencoder.spatial_factor(vae)
    if (channels, factor) != (new_channels, new_factor):
        raise UserError(
            f"the VAE {name} does not fit the teacher: its latents have {new_channels} channels "
            f"and are {new_factor} times smaller than the images; the teacher's have {channels} "
            f"channels and are {factor} times smaller. Give a VAE for the same latents."
        )
    pipeline.register_modules(vae=vae)


def compute_revision(source: Path, config: Path | None, loras: str | None, vae: str | None) -> str:
    """A digest of all weights of a teacher; for a plain folder, the digest of the folder."""
    digest = sha256(source)[:16]

    extras = []
    if loras:
        for text in loras.split(","):
            path, scale = parse_lora(text)
            extras.append(f"{sha256(path)}@{scale}")
    if vae:
        extras.append(autoencoder.vae_revision(vae))
    if config and source.is_file():
        extras.append(sha256(config))

    if not extras:
        return digest
    return hashlib.sha256("+".join([digest, *extras]).encode()).hexdigest()[:16]
