"""Teachers that are not a plain pipeline folder: a single file, merged LoRAs, another VAE."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import check_downloaded, read_json, sha256, translate_error
from diffusion2gan.teacher import autoencoder, strict_loading
from diffusion2gan.teacher.families import FAMILIES

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

# Single files in fp8, of ComfyUI: each weight is to be multiplied by its scale. The other entries
# are for computing in fp8.
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
FP8_ONLY = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# Empty entries of single files that name what their network predicts
V_PREDICTION_KEY = "v_pred"
ZERO_SNR_KEY = "ztsnr"
EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")

# Parts of the names in files of other kinds than LoRA
OTHER_ADAPTERS = {"hada_": "a LoHa", "lokr_": "a LoKr", "oft_": "an OFT", "glora": "a GLoRA"}


def is_single_file(name: str) -> bool:
    """Whether `name` is a .safetensors file. Raises UserError if it is a pickle.

    Loading a pickle can run code that is stored in it.
    """
    if name.lower().endswith(PICKLE_SUFFIXES):
        converted = Path(name).with_suffix(".safetensors")
        raise UserError(
            f"{name} is a pickle, which can run code when it is loaded, so it is refused. If you "
            "trust it, convert it once: "
            'python -c "import sys, torch; from safetensors.torch import save_file; '
            "d = torch.load(sys.argv[1], weights_only=True); d = d.get('state_dict', d); "
            "save_file({k: v.contiguous() for k, v in d.items() if hasattr(v, 'shape')}, "
            f'sys.argv[2])" {name} {converted}'
        )
    return name.lower().endswith(".safetensors")


def load_single_file(file: Path, config: Path | None, pipeline_class: str | None) -> Any:
    """Loads a pipeline in float32 from one .safetensors file.

    `config` is the folder of a pipeline of the same class, `pipeline_class`. A UNet model's file
    contains all weights, and the folder gives only configs and tokenizers. A transformer model's
    file contains the transformer, and all else comes from the folder. Weights in fp8 are multiplied
    by their scales. Raises UserError if one is missing or they do not fit each other.
    """
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    check_downloaded(file)
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
            tensors = read_plain_weights(file)
            if FAMILIES[pipeline_class].network == "unet":
                pipeline = _load_unet_file(file, config, pipeline_class, tensors)
                set_prediction(pipeline, file, config)
                return pipeline
            return _load_transformer_file(file, config, pipeline_class, tensors)


def read_plain_weights(file: Path) -> dict[str, Tensor] | None:
    """The weights of a single file by their plain names, in fp8 multiplied by their scales.

    None if the file has them so. Raises UserError if a weight is quantised in another way.
    """
    keys = list(strict_loading.read_shapes(file))
    prefix = strict_loading.wrapper_prefix(keys)
    scale_keys = [key for key in keys if key.endswith(SCALE_SUFFIXES)]
    if not prefix and not scale_keys:
        return None

    tensors = load_file(file)
    for key in scale_keys:
        name = key.removesuffix(".scale_weight").removesuffix(".weight_scale") + ".weight"
        weight = tensors.get(name)
        if weight is None or weight.dtype not in FP8:
            kind = "missing" if weight is None else f"in {str(weight.dtype).removeprefix('torch.')}"
            raise UserError(
                f"{file} has a scale {key}, but {name} is {kind}: it is quantised in a way that is "
                "not supported, only fp8 with one scale per weight or row is. Give the file in "
                "float16 or bfloat16."
            )
        scale = tensors.pop(key).float()
        if scale.numel() > 1:
            scale = scale.reshape(-1, *[1] * (weight.ndim - 1))  # one per row
        tensors[name] = weight.float() * scale
    plain = {}
    for key, tensor in tensors.items():
        if not key.endswith(FP8_ONLY):
            plain[key.removeprefix(prefix)] = tensor
    return plain


def set_prediction(pipeline: Any, file: Path, config: Path) -> None:
    """Sets a UNet pipeline's prediction type and noise schedule as its single file names them.

    An entry `v_pred` stands for v prediction, `ztsnr` beside it for zero terminal SNR; the folder's
    scheduler usually is the base model's, which predicts ε. Raises UserError if the file names
    noise levels that are not supported, or its metadata and the folder contradict each other.
    """
    marks = read_prediction(file)
    predicted = pipeline.scheduler.config.get("prediction_type", "epsilon")
    where = f"{config}/scheduler/scheduler_config.json"
    if marks["edm"]:
        raise UserError(
            f"{file} was trained with EDM's noise levels (it has an entry {marks['edm']}), which "
            "are not supported. Give a model with Stable Diffusion's noise schedule."
        )
    if marks["metadata"] and not marks["v_pred"] and marks["metadata"] != predicted:
        raise UserError(
            f"{file} says in its metadata that it predicts {marks['metadata']}, but {where} says "
            f"{predicted}. Set prediction_type there to what the model was trained for."
        )
    if marks["ztsnr"] and not marks["v_pred"] and predicted == "epsilon":
        raise UserError(
            f"{file} has an entry {ZERO_SNR_KEY}, so it was trained with zero terminal SNR, but "
            f"{where} says that it predicts ε, which is not possible together. Set prediction_type "
            "there to what the model was trained for."
        )

    # The scheduler
    settings: dict[str, Any] = {}
    if marks["v_pred"]:
        settings["prediction_type"] = "v_prediction"
    if marks["ztsnr"]:
        settings["rescale_betas_zero_snr"] = True
        settings["timestep_spacing"] = "trailing"  # the last timestep must be used
    if settings:
        scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
        pipeline.register_modules(scheduler=scheduler)


def read_prediction(file: Path) -> dict[str, Any]:
    """What a single file states about its network's output.

    `v_pred` and `ztsnr`: whether it has these entries; `edm`: the first entry of EDM_KEYS that it
    has; `metadata`: the prediction type in its metadata, under diffusers' name, if any.
    """
    with safe_open(file, framework="pt") as opened:
        keys = set(opened.keys())
        metadata = opened.metadata() or {}
    stated = metadata.get("modelspec.prediction_type", "").lower()
    names = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    return {
        "v_pred": V_PREDICTION_KEY in keys,
        "ztsnr": ZERO_SNR_KEY in keys,
        "edm": next((key for key in EDM_KEYS if key in keys), None),
        "metadata": names.get(stated),
    }


def _load_unet_file(
    file: Path, config: Path, pipeline_class: str, tensors: dict[str, Tensor] | None
) -> Any:
    options: dict[str, Any] = {}
    if pipeline_class == "StableDiffusionPipeline":
        options["safety_checker"] = None
    kind: Any = getattr(diffusers, pipeline_class)
    return strict_loading.load_single_file(kind, file, tensors, config=str(config), **options)


def _load_transformer_file(
    file: Path, config: Path, pipeline_class: str, tensors: dict[str, Tensor] | None
) -> Any:
    # The transformer, of the class that the folder's config names
    transformer_config = read_json(config / "transformer" / "config.json")
    transformer_class: Any = getattr(diffusers, transformer_config["_class_name"])
    shapes = strict_loading.read_shapes(file)
    if tensors is not None:
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    strict_loading.check_file_in_own_format(transformer_class, file, transformer_config, shapes)
    transformer = strict_loading.load_single_file(
        transformer_class, file, tensors, config=str(config), subfolder="transformer"
    )

    # The pipeline around it
    components: dict[str, Any] = {"transformer": transformer}
    has_third_encoder = (config / "text_encoder_3").is_dir()
    if pipeline_class == "StableDiffusion3Pipeline" and not has_third_encoder:
        components["text_encoder_3"] = None
        components["tokenizer_3"] = None
    kind: Any = getattr(diffusers, pipeline_class)
    return strict_loading.load_pipeline(kind, config, components)


def merge_loras(pipeline: Any, loras: str) -> set[str]:
    """Merges LoRAs permanently into a pipeline's weights: `PATH[@SCALE]`, separated by commas.

    Returns the names of the components that they change. Raises UserError if peft is not installed,
    or if a LoRA does not exist or does not fit.
    """
    _require_peft()
    kind = type(pipeline).__name__
    changed: set[str] = set()
    for path, scale in parse_loras(loras):
        check_is_lora(path)

        # Load it as an adapter. A LoRA without any matching layer adds no adapter or raises.
        adapters_before = _count_adapters(pipeline)
        try:
            strict_loading.load_lora(
                pipeline, path, str(path), adapter_name="merged", local_files_only=True
            )
        except UserError:
            raise
        except Exception as error:
            failure = translate_error(f"the LoRA {path}", error)
            if failure is not None:
                raise failure from error
            reason = strict_loading.describe_error(error)
            if isinstance(error, OSError | SafetensorError):
                raise UserError(
                    f"the LoRA {path} does not load: {reason}. Compare it with the original, or "
                    "copy or download it again."
                ) from error
            # A LoRA of other layers or sizes raises many kinds: ValueError, KeyError, IndexError, …
            raise UserError(
                f"the LoRA {path} does not fit this teacher's {kind} ({reason}); it was probably "
                "made for another base model."
            ) from error
        if _count_adapters(pipeline) == adapters_before:
            raise UserError(
                f"the LoRA {path} has no layer of this teacher's {kind}; it was made for another "
                "base model."
            )

        # Merge it into the weights
        changed |= set(_count_adapters(pipeline))
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    return changed


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


def check_is_lora(path: Path) -> None:
    """Raises UserError if a file is a Git LFS pointer, or an adapter of another kind than LoRA."""
    if not path.is_file():
        return
    check_downloaded(path)
    with strict_loading.translated_errors(f"the LoRA {path}"):
        keys = list(strict_loading.read_shapes(path))
    for part, kind in OTHER_ADAPTERS.items():
        found = next((key for key in keys if part in key), None)
        if found:
            raise UserError(
                f"{path} is {kind}, not a LoRA (it has {found}), and diffusers cannot merge it. "
                "Merge it into the model with the tool that made it, and give the merged model."
            )


def parse_loras(text: str) -> list[tuple[Path, float]]:
    """`PATH[@SCALE]`, separated by commas → the paths and scales.

    A path may contain commas: the longest text that names a file is one path.
    """
    pieces = text.split(",")
    loras = []
    start = 0
    while start < len(pieces):
        stop = start + 1
        for longer in range(len(pieces), start + 1, -1):
            if _lora_exists(",".join(pieces[start:longer])):
                stop = longer
                break
        loras.append(parse_lora(",".join(pieces[start:stop])))
        start = stop
    return loras


def _lora_exists(text: str) -> bool:
    """Whether `PATH[@SCALE]` names an existing path."""
    text = text.strip()
    paths = (Path(text), Path(text.rpartition("@")[0] or text))
    return any(path.expanduser().exists() for path in paths)


def parse_lora(text: str) -> tuple[Path, float]:
    """`PATH[@SCALE]` → path and scale, 1 by default. An existing path may contain an @.

    Raises UserError if the scale is not a number or the file does not exist.
    """
    path, at, scale = text.strip().rpartition("@")
    if not at or Path(text.strip()).expanduser().exists() or "/" in scale:
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
    if not Path(path).expanduser().exists():
        raise UserError(f"no such LoRA: {path}")
    return Path(path).expanduser(), number


def replace_vae(pipeline: Any, name: str) -> Path:
    """Replaces a pipeline's VAE; returns the folder of the new one.

    Raises UserError if the new VAE's latents differ in shape.
    """
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
    return autoencoder.find_vae(name)


def compute_revision(source: Path, config: Path | None, loras: str | None, vae: str | None) -> str:
    """A digest of all weights of a teacher; for a plain folder, the digest of the folder."""
    digest = sha256(source)[:16]

    extras = []
    if loras:
        for path, scale in parse_loras(loras):
            extras.append(f"{sha256(path)}@{scale}")
    if vae:
        extras.append(autoencoder.vae_revision(vae))
    if config and source.is_file():
        extras.append(sha256(config))

    if not extras:
        return digest
    return hashlib.sha256("+".join([digest, *extras]).encode()).hexdigest()[:16]
