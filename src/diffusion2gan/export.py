"""`diffusion2gan export`: writes a run's student as a one-step diffusers pipeline folder."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion2gan.callable_module import make_callable
from diffusion2gan.distill.run import FREE_SETTINGS, ROUNDING_SETTINGS, load_student
from diffusion2gan.distill.student import Student
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import parse_recipe
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import atomic_write, hash_files, read_json
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.markdown import inline_code, markdown_text, yaml_text
from diffusion2gan.teacher.loading import absent_components
from diffusion2gan.teacher.one_step import one_step_scheduler
from diffusion2gan.teacher.pipeline import Teacher

make_callable(__name__)  # `diffusion2gan.export(…)` is `api.export`

MODEL_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: {licence}
---

# One-step student of {teacher}

This text-to-image pipeline generates an image in one step, without classifier-free guidance.
It was distilled from {teacher_code} with diffusion2gan, an implementation of *Distilling Diffusion
Models into Conditional GANs* (Kang et al., ECCV 2024).

## Usage

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER"{absent})
image = pipe("a prompt"{size}, num_inference_steps=1, guidance_scale=0).images[0]
```
{lora}
## Training

- Teacher: {teacher_code}, weights {revision}
- Training data: {num_pairs} noise→image pairs from the teacher ({steps} steps of the
  deterministic solver {solver}, guidance scale {guidance})
- Pairs seen in training: {pairs_seen}
- Loss: {loss}
- Trained weights: {trained_weights}

All settings of the run are in `diffusion2gan.json`.

## Evaluation

Metrics: {metrics}.

## License

The license of the teacher applies to these weights: {licence_note}.
"""

LORA_USAGE = """
The same student as a LoRA for the teacher, `lora/pytorch_lora_weights.safetensors`:

```python
from diffusers import {scheduler}, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH/TO/THE/TEACHER"{absent})
pipe.scheduler = {scheduler}.from_pretrained("PATH/TO/THIS/FOLDER", subfolder="scheduler")
pipe.load_lora_weights("PATH/TO/THIS/FOLDER/lora")
image = pipe("a prompt"{size}, num_inference_steps=1, guidance_scale=0).images[0]
```
"""


def export(
    run: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    *,
    overwrite: bool = False,
    metrics: Path | None = None,
) -> None:
    """Writes the averaged student of `run` to the folder `out`, for `from_pretrained`.

    `run` is a run's folder or one of its checkpoints. `out` is written atomically and replaces an
    earlier export of the same run, and with `overwrite` that of another. `metrics`: what `evaluate`
    wrote, for the model card; by default the run's metrics.json, if it has one. Raises UserError if
    `out` contains anything else, or another process is writing to it.
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

    # 3. Pipeline and LoRA
    with exclusive_lock(out), atomic_write(out) as temporary:
        write_pipeline(teacher, student.fused(), temporary, dtype)
        lora = student.lora()
        if lora is not None:
            write_lora(teacher, lora, temporary / "lora", dtype)

        # 4. Digests; model_index.json may be edited later, to leave a text encoder out
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        names = [path.relative_to(temporary).as_posix() for path in files]
        names.remove("model_index.json")
        description = {**description, "sha256": hash_files(temporary, names)}

        # 5. Model card and description
        card = model_card(description, teacher, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / "diffusion2gan.json").write_text(
            json.dumps(description, indent=2) + "\n", encoding="utf-8"
        )


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
    teacher: Teacher, student: dict[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Writes the teacher's pipeline with the student's weights and a one-step scheduler.

    The teacher in memory is not modified.
    """
    # A shallow copy of the pipeline, with deep copies of the components that change
    pipeline = copy.copy(teacher.pipeline)
    network_name = teacher.family.network
    for name, component in pipeline.components.items():
        changes = name == network_name or dtype != torch.float32
        if isinstance(component, nn.Module) and changes:
            setattr(pipeline, name, copy.deepcopy(component))

    # The student
    network = getattr(pipeline, network_name)
    network.load_state_dict(student)
    if network_name == "unet":
        # A call without height and width then generates images of the size of the pairs
        network.register_to_config(sample_size=teacher.latent_shape[1])
    pipeline.scheduler = one_step_scheduler(teacher)
    if "requires_safety_checker" in pipeline.config:
        pipeline.register_to_config(requires_safety_checker=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.to(dtype=dtype)
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                problem = f"the {name} cannot be exported in {dtype}; nothing was written."
                checkpoint.check_finite(component.state_dict(), problem)
        pipeline.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        remove_local_path(path)


def write_lora(teacher: Teacher, lora: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Writes `pytorch_lora_weights.safetensors`, for the teacher's `load_lora_weights`."""
    layers = {name: weight.detach().to(dtype).contiguous() for name, weight in lora.items()}
    checkpoint.check_finite(layers, f"the LoRA cannot be exported in {dtype}; nothing was written.")
    argument = f"{teacher.family.network}_lora_layers"
    type(teacher.pipeline).save_lora_weights(folder, **{argument: layers})


def remove_local_path(path: Path) -> None:
    """Removes `_name_or_path`, the teacher's location on this machine, from a diffusers config."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def model_card(description: dict[str, Any], teacher: Teacher, folder: Path) -> str:
    """The model card of the exported pipeline in `folder`, as markdown for a model hub."""
    recipe = description["recipe"]
    pairs = description["pairs"]

    # Arguments that the examples need: components that are absent, and the size of a transformer's
    # images (a UNet has it in its config)
    absent = "".join(f", {name}=None" for name in absent_components(folder))
    size = ""
    if teacher.family.network == "transformer":
        height, width = teacher.image_size
        size = f", height={height}, width={width}"

    lora = ""
    trained_weights = "all"
    if recipe["lora_rank"]:
        scheduler = type(one_step_scheduler(teacher)).__name__
        lora = LORA_USAGE.format(scheduler=scheduler, absent=absent, size=size)
        trained_weights = f"a LoRA of rank {recipe['lora_rank']}, merged into the network"

    licence = read_licence(teacher)
    return MODEL_CARD.format(
        teacher=markdown_text(pairs["teacher"]),
        teacher_code=inline_code(pairs["teacher"]),
        revision=markdown_text(pairs["revision"]),
        num_pairs=pairs["count"],
        solver=inline_code(pairs.get("solver", "ddim")),  # sets from before the choice
        steps=pairs["num_inference_steps"],
        guidance=pairs["guidance_scale"],
        pairs_seen=description["pairs_seen"],
        loss=inline_code(recipe["loss"]),
        trained_weights=trained_weights,
        absent=absent,
        size=size,
        lora=lora,
        metrics=format_metrics(description),
        licence=yaml_text(licence or "other"),
        licence_note=markdown_text(
            licence or "its folder does not state it; see where the teacher was published"
        ),
    )


def read_licence(teacher: Teacher) -> str | None:
    """The `license:` field of the teacher's model card (README.md), or None."""
    if teacher.folder is None:
        return None
    folder = teacher.folder if teacher.folder.is_dir() else teacher.folder.parent
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text("utf-8", errors="replace")
    field = re.search(r"^license(?:_name)?: *(\S+)", text, re.M)
    return field.group(1).strip("\"'") if field else None


def format_metrics(description: dict[str, Any]) -> str:
    """The metrics that `evaluate` wrote to the run's metrics.json, if any."""
    metrics = description.get("metrics") or {}
    if not isinstance(metrics, dict):
        return "not measured"
    numbers = []
    for name, value in metrics.items():
        if isinstance(value, float):
            numbers.append(f"{markdown_text(name)} {value:.4g}")
    return ", ".join(numbers) if numbers else "not measured"
