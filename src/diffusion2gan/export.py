"""`diffusion2gan export`: writes a run's student as a one-step diffusers pipeline folder."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion2gan.callable_module import make_callable
from diffusion2gan.distill.run import FREE_SETTINGS, ROUNDING_SETTINGS, load_student
from diffusion2gan.distill.student import Student
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.model_card import Contents, model_card, usage_snippet
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.recipe import parse_recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write, hash_files, is_hidden, read_json
from diffusion2gan.runtime.images import to_pillow
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.single_file import clip_names, kohya_lora, write_single_file
from diffusion2gan.teacher import hub
from diffusion2gan.teacher.loading import absent_components
from diffusion2gan.teacher.one_step import one_step_scheduler
from diffusion2gan.teacher.pipeline import Teacher
from diffusion2gan.teacher.strict_loading import WEIGHTS_FILE, find_variant

make_callable(__name__)  # `diffusion2gan.export(…)` is `api.export`

NUM_SAMPLES = 4  # images in the model card
SAMPLE_PROMPTS = (
    "a photograph of a lighthouse on a cliff at sunset",
    "a bowl of oranges on a wooden table, oil painting",
    "a red fox in the snow",
    "a small robot that waters flowers, digital art",
)
POCKET_SAMPLE_PROMPTS = (
    "a big red ring on a blue ground",
    "two small green stars on a yellow ground",
    "three blue squares",
    "a small yellow star",
)

# Files of a component's folder that stock diffusers does not read with safetensors
OTHER_WEIGHTS = {".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".pt", ".pth"}


def export(
    run: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    *,
    overwrite: bool = False,
    metrics: Path | None = None,
    variant: str | None = None,
    single_file: bool = False,
    sample_prompts: Sequence[str] | None = None,
) -> str:
    """Writes the averaged student of `run` to the folder `out`, for `from_pretrained`.

    `run` is a run's folder or one of its checkpoints. `out` is written atomically and replaces an
    earlier export of the same run, and with `overwrite` that of another. `metrics`: what `evaluate`
    wrote, for the model card; by default the run's metrics.json, if it has one. `variant` is part
    of the names of the weights' files, such as fp16. `single_file`: also writes
    `out`/NAME.safetensors, see `single_file.py`. `sample_prompts`: of the sample images in the
    model card, the first four; no images if empty.

    Returns Python code that uses the export. Raises UserError if `out` contains anything else, or
    another process is writing to it.
    """
    # 1. Only an earlier export may be replaced
    is_export = (out / "diffusion2gan.json").is_file()
    in_use = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if in_use and not is_export:
        raise UserError(
            f"{out} already exists and is not an export, so it is not replaced; choose another "
            "--out"
        )

    # 2. The student with its averaged weights
    teacher, average, description = load_student(run)
    if is_export and not overwrite:
        check_same_run(out, description)
    student = Student.from_recipe(parse_recipe(description["recipe"], str(run)), teacher)
    checkpoint.check_weights(run, student.trained.state_dict(), average)
    student.trained.load_state_dict(average)
    if metrics is None and (run / "metrics.json").is_file():
        metrics = run / "metrics.json"
    if metrics is not None:
        description = {**description, "metrics": read_metrics(metrics)}

    # 3. Pipeline, single file, LoRA
    with exclusive_lock(out), atomic_write(out) as temporary:
        weights = student.fused()
        write_pipeline(teacher, weights, temporary, dtype, variant)
        file = out.resolve().name + ".safetensors" if single_file else None
        if file is not None:
            write_single_file(teacher, weights, temporary / file, dtype)
        lora = student.lora()
        if lora is not None:
            write_lora(teacher, lora, temporary, dtype)

        # 4. Samples
        if sample_prompts is None:
            is_pocket = description["recipe"]["teacher"] == "pocket"
            sample_prompts = POCKET_SAMPLE_PROMPTS if is_pocket else SAMPLE_PROMPTS
        contents = Contents(
            absent=tuple(absent_components(temporary)),
            variant=variant,
            single_file=file,
            samples=write_samples(teacher, student, temporary, sample_prompts[:NUM_SAMPLES]),
            had_checker="safety_checker" in teacher.pipeline.config,
        )

        # 5. Digests; model_index.json may be edited later, to leave a text encoder out
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        names = [path.relative_to(temporary).as_posix() for path in files]
        names.remove("model_index.json")
        description = {**description, "sha256": hash_files(temporary, names)}

        # 6. Model card and description
        card = model_card(description, teacher, contents)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / "diffusion2gan.json").write_text(
            json.dumps(description, indent=2) + "\n", encoding="utf-8"
        )
    return usage_snippet(teacher, contents, str(out))


def check_same_run(out: Path, description: dict[str, Any]) -> None:
    """Raises UserError unless the export in `out` is of the described run, at any point of it."""
    existing = read_json(out / "diffusion2gan.json")
    if not isinstance(existing, dict) or not isinstance(existing.get("recipe"), dict):
        existing = {"recipe": {}, "pairs": {}}

    # Settings that may change while a run is resumed
    changeable = FREE_SETTINGS | ROUNDING_SETTINGS
    differences = []
    for key, value in description["recipe"].items():
        existing_value = existing["recipe"].get(key, "not set")
        if key not in changeable and existing_value != value:
            differences.append(f"{key}: {existing_value!r} there, {value!r} in this run")
    if existing.get("pairs") != description["pairs"]:
        differences.append("other pairs")
    if differences:
        raise UserError(
            f"{out} contains the export of another run ({'; '.join(differences[:3])}), which is "
            "not replaced. Choose another --out, or replace it with --overwrite."
        )


def read_metrics(path: Path) -> dict[str, Any]:
    """What `evaluate` wrote. Raises UserError if the file is missing or contains something else."""
    metrics = read_json(path)
    if not isinstance(metrics, dict) or not any(map(is_number, metrics.values())):
        raise UserError(
            f"{path} does not contain the metrics of one system; `diffusion2gan evaluate` writes "
            "such a file"
        )
    return metrics


def is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def write_pipeline(
    teacher: Teacher,
    student: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    variant: str | None = None,
) -> None:
    """Writes the teacher's pipeline with the student's weights and a one-step scheduler.

    What the student shares with the teacher is copied byte for byte from the teacher's files;
    with another `dtype` than float32, the numbers in them are converted. The teacher in memory is
    not modified.
    """
    # 1. The network, with the size of its pairs as the default of a call
    network_name = teacher.family.network
    network = copy.deepcopy(getattr(teacher.pipeline, network_name))
    network.load_state_dict(student)
    if network_name == "unet":
        _, height, width = teacher.latent_shape
        network.register_to_config(sample_size=height if height == width else [height, width])
    save_component(network_name, network, folder / network_name, dtype, variant)

    # 2. The scheduler
    one_step_scheduler(teacher).save_pretrained(folder / "scheduler")

    # 3. The teacher's other components
    left_out = {network_name, "scheduler", "safety_checker", "feature_extractor"}
    for name, component in teacher.pipeline.components.items():
        if name in left_out or component is None:
            continue
        if name in teacher.sources:
            copy_component(name, teacher.sources[name], folder / name, dtype, variant)
        else:
            save_component(name, component, folder / name, dtype, variant)

    # 4. The index
    write_index(teacher, folder)


def write_index(teacher: Teacher, folder: Path) -> None:
    """Writes model_index.json: the teacher's, with what the export changes."""
    if teacher.config_folder is not None:
        index = hub.read_index(teacher.config_folder)
    else:
        teacher.pipeline.save_config(folder)
        index = hub.read_index(folder)

    index["scheduler"] = ["diffusers", type(one_step_scheduler(teacher)).__name__]
    for name in ("safety_checker", "feature_extractor"):
        if name in index:
            index[name] = [None, None]
    if type(teacher.pipeline).__name__ == "StableDiffusionPipeline":
        index["requires_safety_checker"] = False
    index.pop("_name_or_path", None)
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def save_component(
    name: str, component: Any, folder: Path, dtype: torch.dtype, variant: str | None
) -> None:
    """Writes a component from memory, without its location on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not isinstance(component, nn.Module):
            component.save_pretrained(folder)
            return
        saved: Any = copy.deepcopy(component).to(dtype=dtype)
        problem = f"the {name} cannot be exported in {dtype}; nothing was written."
        checkpoint.check_finite(saved.state_dict(), problem)
        saved.save_pretrained(folder, safe_serialization=True, variant=variant)
    remove_local_path(folder / "config.json")

    # transformers 5.6 and later write the names without a prefix, which earlier ones do not read
    if type(component).__name__ == "CLIPTextModel":
        for file in folder.glob("*.safetensors"):
            save_file(clip_names(load_file(file)), file, {"format": "pt"})


def copy_component(
    name: str, source: Path, folder: Path, dtype: torch.dtype, variant: str | None
) -> None:
    """Copies the files of a component, byte for byte where `dtype` is float32.

    In another `dtype` its numbers are converted, under the same names. Weights get `variant` in
    their files' names, in place of that which they have. Copied are safetensors of the variant that
    is loaded, and all that are not weights.
    """
    folder.mkdir(parents=True)
    loaded = find_variant(source)
    for path in sorted(source.iterdir()):
        if is_hidden(path) or not path.is_file() or path.suffix in OTHER_WEIGHTS:
            continue

        # Weights: of one variant, renamed
        if match := WEIGHTS_FILE.fullmatch(path.name):
            if match["variant"] != loaded:
                continue
            target = folder / rename_weights(path.name, variant)
            if dtype == torch.float32:
                shutil.copyfile(path, target)
            else:
                convert_weights(name, path, target, dtype)
            continue

        # The index of shards names these files
        if ".safetensors.index" in path.name:
            if path.name.endswith(f"index.{loaded}.json" if loaded else "index.json"):
                copy_shard_index(path, folder, loaded, variant)
            continue
        shutil.copyfile(path, folder / path.name)


def rename_weights(name: str, variant: str | None) -> str:
    """The name of a weights file with another variant, or none."""
    match = WEIGHTS_FILE.fullmatch(name)
    assert match is not None
    shard = match["shard"] or match["old_shard"]
    return f"{match['name']}{'.' + variant if variant else ''}{shard}.safetensors"


def copy_shard_index(path: Path, folder: Path, loaded: str | None, variant: str | None) -> None:
    """Copies the index of a component's shards; byte for byte if the variant is the same."""
    if loaded == variant:
        shutil.copyfile(path, folder / path.name)
        return
    index = read_json(path)
    weight_map = {key: rename_weights(name, variant) for key, name in index["weight_map"].items()}
    text = json.dumps({**index, "weight_map": weight_map}, indent=2) + "\n"
    stem = path.name.partition(".index")[0]
    name = f"{stem}.index{'.' + variant if variant else ''}.json"
    (folder / name).write_text(text, encoding="utf-8")


def convert_weights(name: str, source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copies a safetensors file with its floating-point tensors in `dtype`."""
    tensors = load_file(source)
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[key] = tensor.to(dtype)
    problem = f"the {name} cannot be exported in {dtype}; nothing was written."
    checkpoint.check_finite(tensors, problem)
    save_file(tensors, target, {"format": "pt"})


def write_lora(teacher: Teacher, lora: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Writes `pytorch_lora_weights.safetensors`, for the teacher's `load_lora_weights`.

    Of a UNet also `lora_kohya.safetensors`, with the names that ComfyUI and A1111 read.
    """
    layers = {name: weight.detach().to(dtype).contiguous() for name, weight in lora.items()}
    checkpoint.check_finite(layers, f"the LoRA cannot be exported in {dtype}; nothing was written.")
    argument = f"{teacher.family.network}_lora_layers"
    type(teacher.pipeline).save_lora_weights(folder, **{argument: layers})
    if teacher.family.network == "unet":
        save_file(kohya_lora(layers), folder / "lora_kohya.safetensors", {"format": "pt"})


@torch.no_grad()
def write_samples(
    teacher: Teacher, student: Student, folder: Path, prompts: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Writes an image of each prompt into `folder`/samples; returns the files and the prompts."""
    student.eval()
    samples = []
    for i, prompt in enumerate(prompts):
        noise = noise_from_seeds([i], teacher.latent_shape).to(teacher.device)
        latents = student(noise, teacher.encode([prompt]))
        (image,) = to_pillow(teacher.decode(latents))
        file = f"samples/{i}.png"
        (folder / "samples").mkdir(exist_ok=True)
        image.save(folder / file)
        samples.append((file, prompt))
    return tuple(samples)


def push_to_hub(folder: Path, repository: str, private: bool = False) -> str:
    """Uploads an export to a model hub, as one commit; returns its address.

    `repository` is ORG/NAME; it is created if it does not exist. The token is huggingface_hub's
    (`hf auth login` or HF_TOKEN), the hub that of HF_ENDPOINT. Raises Failure if the hub refuses
    or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="One-step student, by diffusion2gan export",
        )
    except Exception as error:
        # httpx's and huggingface_hub's errors have no common base class but OSError and ValueError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Failure(
            f"{folder} is complete, but it could not be pushed to {repository} ({reason}). Check "
            "the name, the connection and the token (`hf auth login`, or HF_TOKEN), then run "
            f"`hf upload {repository} {folder}`."
        ) from error
    return str(address)


def remove_local_path(path: Path) -> None:
    """Removes `_name_or_path`, the teacher's location on this machine, from a diffusers config."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
