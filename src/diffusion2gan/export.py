"""`diffusion2gan export`: a run's student as an ordinary one-step pipeline folder."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from diffusion2gan.distill.run import load_student
from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import whole
from diffusion2gan.teacher.pipeline import Teacher

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---

# One-step student of {teacher}

Distilled by diffusion2gan (the method of *Distilling Diffusion Models into Conditional GANs*, Kang et al., ECCV 2024)
from {count} noise→image pairs of `{teacher}` (weights {revision}, {steps} DDIM steps, guidance {guidance}), {seen}
pairs seen, loss `{loss}`. It runs in one step and in no other number of steps:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER")
image = pipe("a prompt", num_inference_steps=1, guidance_scale=0).images[0]
```

The teacher's licence applies to these weights. The settings of the run are in `diffusion2gan.json`.
"""


def export(run: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes `out`, whole or not at all: a folder for `DiffusionPipeline.from_pretrained`, one step, no guidance.

    An earlier export there is replaced. Raises UserError where `out` holds anything else.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "diffusion2gan.json").is_file()):
        raise UserError(f"{out} is there already and is no export, so it is not replaced; choose another --out")
    teacher, student, described = load_student(run)
    with whole(out) as temporary:
        write_pipeline(teacher, student, temporary, dtype)
        _write_card(described, temporary)


def write_pipeline(teacher: Teacher, student: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """The teacher's pipeline with the student's UNet and a scheduler that takes exactly one step at T.

    LCMScheduler with `original_inference_steps=1` starts at the last timestep and returns x0 (its boundary terms are
    6e-8 there); any other number of steps raises. The teacher itself is left as it is.
    """
    pipeline = copy.deepcopy(teacher.pipeline)
    pipeline.unet.load_state_dict(student)
    pipeline.scheduler = LCMScheduler.from_config(
        teacher.scheduler.config, original_inference_steps=1, clip_sample=False
    )
    pipeline.register_to_config(requires_safety_checker=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.to(dtype=dtype).save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):
        _forget_origin(path)


def _forget_origin(path: Path) -> None:
    """Drops diffusers' `_name_or_path` from a config: where the teacher lay on this machine is nobody's business."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_card(described: dict[str, Any], folder: Path) -> None:
    recipe, pairs = described["recipe"], described["pairs"]
    text = CARD.format(
        teacher=pairs["teacher"], revision=pairs["revision"], count=pairs["count"], steps=pairs["num_inference_steps"],
        guidance=pairs["guidance_scale"], seen=described["pairs_seen"], loss=recipe["loss"],
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "diffusion2gan.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
