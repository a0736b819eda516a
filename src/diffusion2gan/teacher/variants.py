"""What a teacher can be besides a folder: a single file, a folder with LoRAs merged into it, another VAE."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import sha256
from diffusion2gan.teacher import autoencoder
from diffusion2gan.teacher.families import FAMILIES

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def is_single_file(name: str) -> bool:
    """Raises UserError where it is a pickle: loading one can run what is in it."""
    if name.endswith(PICKLES):
        raise UserError(
            f"{name} is a pickle, which can run code when it is read, so it is not. Where you trust it, convert it "
            'once, elsewhere: python -c "import sys, torch; from safetensors.torch import save_file; d = torch.load('
            "sys.argv[1], weights_only=True); d = d.get('state_dict', d); save_file({k: v.contiguous() for k, v in "
            f"d.items() if hasattr(v, 'shape')}}, sys.argv[2])\" {name} {Path(name).with_suffix('.safetensors')}"
        )
    return name.endswith(".safetensors")


def load_single_file(file: Path, config: Path | None, family: str | None) -> Any:
    """A pipeline from one .safetensors, float32. `config` is a pipeline's folder of the same `family` of models.

    A UNet's file holds the whole model: the folder gives configs and tokenizers alone. A transformer's holds the
    transformer: all else comes from the folder. Raises UserError where one is missing or they do not fit.
    """
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    if config is None or family is None:
        raise UserError(
            f"{file} holds weights alone: name a pipeline folder of the same kind of model beside it (configs, "
            "scheduler and tokenizers are read from there): --teacher-config FOLDER, or teacher_config=FOLDER."
        )
    kind: Any = getattr(diffusers, family)
    options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if FAMILIES[family].network == "unet":
                no_checker = {"safety_checker": None} if family == "StableDiffusionPipeline" else {}
                return kind.from_single_file(str(file), config=str(config), **options, **no_checker)
            network = network_class(config)
            transformer = network.from_single_file(
                str(file), config=str(config), subfolder="transformer", **options
            )
            absent = (
                {"text_encoder_3": None, "tokenizer_3": None}
                if not (config / "text_encoder_3").is_dir()
                else {}
            )
            absent = absent if family == "StableDiffusion3Pipeline" else {}
            return kind.from_pretrained(
                config, transformer=transformer, use_safetensors=True, **options, **absent
            )
        except (
            SingleFileComponentError,
            OSError,
            ValueError,
            LookupError,
            RuntimeError,
            AttributeError,
        ) as error:
            told = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"{file} does not load as the {family} that {config} describes: {told}"
            ) from error


def network_class(config: Path) -> Any:
    """The class of a pipeline folder's transformer."""
    return getattr(
        diffusers,
        json.loads((config / "transformer" / "config.json").read_text("utf-8"))["_class_name"],
    )


def merge_loras(pipeline: Any, loras: str) -> None:
    """Adds LoRAs to the pipeline's weights for good: `PATH[@SCALE]`, several with commas between.

    Raises UserError without peft, or where one is not there or was made for another model.
    """
    for lora in loras.split(","):
        path, scale = lora_of(lora)
        before = (
            {name: len(parts) for name, parts in pipeline.get_list_adapters().items()}
            if has_peft()
            else {}
        )
        try:
            pipeline.load_lora_weights(str(path), adapter_name="merged", local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            told = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"the LoRA {path} does not fit a {type(pipeline).__name__} like this teacher ({told}); it was made for "
                "another base model."
            ) from error
        if pipeline.get_list_adapters() == before:
            raise UserError(
                f"the LoRA {path} changes nothing in a {type(pipeline).__name__}: it was made for another base model."
            )
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()


def has_peft() -> bool:
    """Raises UserError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            "a teacher with a LoRA needs peft: pip install 'diffusion2gan[lora]'"
        ) from error
    return True


def lora_of(text: str) -> tuple[Path, float]:
    """`PATH[@SCALE]` → path and scale, 1 if not given. Raises UserError where there is no such file."""
    path, at, scale = text.strip().rpartition("@")
    if not at:
        path, scale = text.strip(), "1"
    try:
        number = float(scale)
    except ValueError:
        raise UserError(
            f"the LoRA {text!r}: what follows @ is its scale, a number, not {scale!r}"
        ) from None
    is_single_file(path)
    if not Path(path).exists():
        raise UserError(f"no such LoRA: {path}")
    return Path(path), number


def replace_vae(pipeline: Any, name: str) -> None:
    """Another VAE for the same latents. Raises UserError where its latents are of another kind."""
    vae = autoencoder.load_vae(name, pipeline.device)
    kinds = [
        (autoencoder.num_latent_channels(x), autoencoder.spatial_factor(x))
        for x in (pipeline.vae, vae)
    ]
    if kinds[0] != kinds[1]:
        (channels, factor), (its_channels, its_factor) = kinds
        raise UserError(
            f"the teacher's latents have {channels} channels and are {factor} times smaller than its pictures, those "
            f"of the VAE {name} {its_channels} and {its_factor}; give a VAE of the same latents."
        )
    pipeline.register_modules(vae=vae)


def revision_of(source: Path, config: Path | None, loras: str | None, vae: str | None) -> str:
    """A digest of all weights that make the teacher; a plain folder's is its own."""
    digest = sha256(source)[:16]
    extras = (
        [sha256(lora_of(lora)[0]) + f"@{lora_of(lora)[1]}" for lora in loras.split(",")]
        if loras
        else []
    )
    extras += [autoencoder.vae_revision(vae)] if vae else []
    extras += [sha256(config)] if config and source.is_file() else []
    if not extras:
        return digest
    return hashlib.sha256("+".join([digest, *extras]).encode()).hexdigest()[:16]
