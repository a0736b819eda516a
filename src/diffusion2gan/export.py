"""`diffusion2gan export`: a run's student as an ordinary one-step pipeline folder."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion2gan.distill.run import load_student
from diffusion2gan.distill.student import Student
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import parse_recipe
from diffusion2gan.runtime.files import atomic_write, read_json
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.teacher.loading import absent_parts
from diffusion2gan.teacher.one_step import one_step_scheduler
from diffusion2gan.teacher.pipeline import Teacher

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: {licence}
---

# One-step student of {teacher}

Distilled by diffusion2gan (the method of *Distilling Diffusion Models into Conditional GANs*, Kang et al., ECCV 2024)
from {count} noise→image pairs of `{teacher}` (weights {revision}, {steps} deterministic steps, guidance {guidance}),
{seen} pairs seen, loss `{loss}`, {kind}. It runs in one step and without guidance:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER"{absent})
image = pipe("a prompt"{size}, num_inference_steps=1, guidance_scale=0).images[0]
```
{lora}
Measured: {measured}.

The teacher's licence applies to these weights: {licence_told}. The settings of the run are in `diffusion2gan.json`.
"""

LORA = """
The same as a LoRA of the teacher, `lora/pytorch_lora_weights.safetensors`:

```python
from diffusers import {scheduler}, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH/TO/THE/TEACHER"{absent})
pipe.scheduler = {scheduler}.from_pretrained("PATH/TO/THIS/FOLDER", subfolder="scheduler")
pipe.load_lora_weights("PATH/TO/THIS/FOLDER/lora")
image = pipe("a prompt"{size}, num_inference_steps=1, guidance_scale=0).images[0]
```
"""


def export(run: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes `out`, whole or not at all: a folder for `DiffusionPipeline.from_pretrained`, one step, no guidance.

    `run`: its folder, or one of its checkpoints. An earlier export there is replaced. Raises UserError where `out`
    holds anything else, or another process writes it.
    """
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "diffusion2gan.json").is_file()
    ):
        raise UserError(
            f"{out} is there already and is no export, so it is not replaced; choose another --out"
        )
    teacher, average, described = load_student(run)
    student = Student.from_recipe(parse_recipe(described["recipe"], str(run)), teacher)
    student.trained.load_state_dict(average)
    if (run / "metrics.json").is_file():
        described = described | {"metrics": read_json(run / "metrics.json")}
    with exclusive_lock(out), atomic_write(out) as temporary:
        write_pipeline(teacher, student.fused(), temporary, dtype)
        lora = student.lora()
        if lora is not None:
            write_lora(teacher, lora, temporary / "lora", dtype)
        _write_card(described, teacher, temporary)


def write_pipeline(
    teacher: Teacher, student: dict[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """The teacher's pipeline with the student's network and a scheduler for exactly one step at T.

    The teacher itself is left as it is.
    """
    pipeline, name = copy.copy(teacher.pipeline), teacher.family.network
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and (part == name or dtype != torch.float32):
            setattr(pipeline, part, copy.deepcopy(module))
    network = getattr(pipeline, name)
    network.load_state_dict(student)
    if name == "unet":  # so that a call without height and width makes pictures of the trained size
        network.register_to_config(sample_size=teacher.latent_shape[1])
    pipeline.scheduler = one_step_scheduler(teacher)
    if "requires_safety_checker" in pipeline.config:
        pipeline.register_to_config(requires_safety_checker=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.to(dtype=dtype).save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        _forget_origin(path)


def write_lora(teacher: Teacher, lora: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """`pytorch_lora_weights.safetensors`, which the teacher's own pipeline takes by `load_lora_weights`."""
    layers = {name: weight.detach().to(dtype).contiguous() for name, weight in lora.items()}
    type(teacher.pipeline).save_lora_weights(
        folder, **{f"{teacher.family.network}_lora_layers": layers}
    )


def _forget_origin(path: Path) -> None:
    """Drops diffusers' `_name_or_path` from a config: where the teacher lay on this machine is nobody's business."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_card(described: dict[str, Any], teacher: Teacher, folder: Path) -> None:
    recipe, pairs = described["recipe"], described["pairs"]
    licence = licence_of(teacher)
    call = {
        "absent": "".join(f", {name}=None" for name in absent_parts(folder)),
        "size": ""
        if teacher.family.network == "unet"
        else ", height={}, width={}".format(*teacher.pixels),
    }
    lora = (
        LORA.format(scheduler=type(one_step_scheduler(teacher)).__name__, **call)
        if recipe["lora_rank"]
        else ""
    )
    text = CARD.format(
        teacher=pairs["teacher"],
        revision=pairs["revision"],
        count=pairs["count"],
        steps=pairs["num_inference_steps"],
        guidance=pairs["guidance_scale"],
        seen=described["pairs_seen"],
        loss=recipe["loss"],
        kind=f"a LoRA of rank {recipe['lora_rank']}, fused" if lora else "all weights trained",
        lora=lora,
        measured=measured(described),
        licence=licence or "other",
        licence_told=licence or "not stated in its folder, so look where it came from",
        **call,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "diffusion2gan.json").write_text(
        json.dumps(described, indent=2) + "\n", encoding="utf-8"
    )


def licence_of(teacher: Teacher) -> str | None:
    """What the teacher's own card says, `license:` in its README.md; None where it says nothing."""
    if teacher.folder is None:
        return None
    card = (teacher.folder if teacher.folder.is_dir() else teacher.folder.parent) / "README.md"
    found = (
        re.search(r"^license(?:_name)?: *(\S+)", card.read_text("utf-8"), re.M)
        if card.is_file()
        else None
    )
    return found.group(1) if found else None


def measured(described: dict[str, Any]) -> str:
    """The numbers of the run's metrics.json, where `evaluate` wrote one there."""
    metrics = described.get("metrics") or {}
    numbers = [f"{key} {value:.4g}" for key, value in metrics.items() if isinstance(value, float)]
    return ", ".join(numbers) if numbers else "not measured"
