"""The model card of an export: README.md with the fields that model hubs read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from diffusion2gan.runtime.markdown import inline_code, markdown_text, yaml_text
from diffusion2gan.teacher.one_step import COMPATIBLE, one_step_scheduler
from diffusion2gan.teacher.pipeline import Teacher

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)@[0-9a-f]{40}")
LICENCE_FIELD = re.compile(r"^(license|license_name|license_link): *(.+?) *$", re.MULTILINE)

MODEL_CARD = """---
{fields}
---

# One-step student of {teacher}

This text-to-image pipeline generates an image in one step, without classifier-free guidance.
It was distilled from {teacher_code} with diffusion2gan, an implementation of *Distilling Diffusion
Models into Conditional GANs* (Kang et al., ECCV 2024).
{samples}
## Usage

```python
{snippet}
```

- **One step.** {steps_note}
- **No guidance, no negative prompt.** The student was trained to give the images that the teacher
  has at guidance scale {guidance}{negative}. {guidance_note}
{notes}{lora}
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

DIFFUSION_STEPS = (
    "Its scheduler, LCMScheduler, raises a ValueError at two or more steps. Other\n"
    "  schedulers made from its config give the same image in one step, within a grey level:\n"
    "  {compatible}.\n"
    "  They do not refuse more steps, which give other, usually worse images."
)
FLOW_STEPS = (
    "Its scheduler, FlowMatchEulerDiscreteScheduler with a very large shift, gives\n"
    "  the same image at more steps, or raises a ValueError. Other schedulers are not supported."
)
CLASSIFIER_FREE = (
    "With `guidance_scale`\n"
    "  above 1 the pipeline evaluates the network twice, uses `negative_prompt`, extrapolates:\n"
    "  no error, but images that the student was not trained for. Use `guidance_scale=0`."
)
EMBEDDED = (
    "It was trained with\n"
    "  `guidance_scale=0` as the network's input; another value gives other images, without an\n"
    "  error."
)
NO_GUIDANCE = "The network takes no guidance scale; the pipeline\n  ignores the argument."

SAFETY_CHECKER = """- **No safety checker.** Stable Diffusion's is not part of this folder,
  whether or not the teacher had one. Images are not filtered.
"""
SINGLE_FILE = """- **One file.** `{name}` contains {contents}.
"""

LORA_USAGE = """
The same student as a LoRA for the teacher, `pytorch_lora_weights.safetensors`{kohya}:

```python
from diffusers import {scheduler}, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH/TO/THE/TEACHER"{absent})
pipe.scheduler = {scheduler}.from_pretrained("{path}", subfolder="scheduler")
pipe.load_lora_weights("{path}", weight_name="pytorch_lora_weights.safetensors")
image = pipe("a prompt"{size}, num_inference_steps=1, guidance_scale=0).images[0]
```
"""


@dataclass(frozen=True)
class Contents:
    """What an export contains beside the pipeline.

    `absent`: components that `from_pretrained` needs as None. `variant`: of the weights' names.
    `single_file`: its name. `samples`: file and prompt of each sample image. `had_checker`: the
    pipeline's class has a safety checker.
    """

    absent: tuple[str, ...] = ()
    variant: str | None = None
    single_file: str | None = None
    samples: tuple[tuple[str, str], ...] = ()
    had_checker: bool = False


def usage_snippet(teacher: Teacher, contents: Contents, path: str = "PATH/TO/THIS/FOLDER") -> str:
    """Python that generates one image with the export in `path`."""
    loading = f'"{path}"'
    for name in contents.absent:
        loading += f", {name}=None"
    if contents.variant is not None:
        loading += f', variant="{contents.variant}"'
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({loading})\n"
        f'image = pipe("a prompt"{_size_arguments(teacher)}, num_inference_steps=1, '
        "guidance_scale=0).images[0]"
    )


def _size_arguments(teacher: Teacher) -> str:
    """The size, where a stock call would not choose it: a square UNet has it in its config."""
    height, width = teacher.image_size
    if teacher.family.network == "unet" and height == width:
        return ""
    return f", height={height}, width={width}"


def model_card(description: dict[str, Any], teacher: Teacher, contents: Contents) -> str:
    """The model card of an export, as markdown for a model hub."""
    recipe = description["recipe"]
    pairs = description["pairs"]

    lora = ""
    trained_weights = "all"
    if recipe["lora_rank"]:
        kohya = ", and for\nComfyUI and A1111 `lora_kohya.safetensors`"
        lora = LORA_USAGE.format(
            scheduler=type(one_step_scheduler(teacher)).__name__,
            absent="".join(f", {name}=None" for name in contents.absent),
            size=_size_arguments(teacher),
            path="PATH/TO/THIS/FOLDER",
            kohya=kohya if teacher.family.network == "unet" else "",
        )
        trained_weights = f"a LoRA of rank {recipe['lora_rank']}, merged into the network"

    # What happens with other settings
    steps_note = FLOW_STEPS
    if not teacher.family.flow:
        steps_note = DIFFUSION_STEPS.format(compatible=",\n  ".join(COMPATIBLE))
    guidance_notes = {"classifier_free": CLASSIFIER_FREE, "embedded": EMBEDDED, "none": NO_GUIDANCE}
    negative = ""
    if pairs.get("negative_prompt"):
        negative = f", away from the negative prompt {inline_code(pairs['negative_prompt'])}"
    notes = SAFETY_CHECKER if contents.had_checker else ""
    if contents.single_file is not None:
        parts = (
            "the transformer alone, in diffusers' names, as ComfyUI's and diffusers' loaders of\n"
        )
        parts += "  single models read it"
        if teacher.family.network == "unet":
            parts = "the whole pipeline in the layout of the original code, for\n"
            parts += "  ComfyUI, A1111 and `from_single_file`: one step, CFG 1"
        notes += SINGLE_FILE.format(name=contents.single_file, contents=parts)

    licence = read_licence(teacher)
    return MODEL_CARD.format(
        fields=card_fields(teacher, description, licence),
        teacher=markdown_text(pairs["teacher"]),
        teacher_code=inline_code(pairs["teacher"]),
        samples=format_samples(contents.samples),
        snippet=usage_snippet(teacher, contents),
        steps_note=steps_note,
        negative=negative,
        guidance_note=guidance_notes[teacher.guidance],
        notes=notes,
        lora=lora,
        revision=markdown_text(pairs["revision"]),
        num_pairs=pairs["count"],
        solver=inline_code(pairs.get("solver", "ddim")),  # sets from before the choice
        steps=pairs["num_inference_steps"],
        guidance=pairs["guidance_scale"],
        pairs_seen=description["pairs_seen"],
        loss=inline_code(recipe["loss"]),
        trained_weights=trained_weights,
        metrics=format_metrics(description),
        licence_note=markdown_text(
            licence.get("license_name")
            or licence.get("license")
            or "its folder does not state it; see where the teacher was published"
        ),
    )


def card_fields(teacher: Teacher, description: dict[str, Any], licence: dict[str, str]) -> str:
    """The YAML fields at the top of the card, from which hubs build their pages."""
    fields = ["library_name: diffusers", "pipeline_tag: text-to-image"]

    # The licence's fields as the teacher's card has them
    fields.append(f"license: {yaml_text(licence.get('license', 'other'))}")
    for name in ("license_name", "license_link"):
        if name in licence:
            fields.append(f"{name}: {yaml_text(licence[name])}")

    # The teacher, if a hub has it
    if match := HUB_NAME.fullmatch(description["pairs"]["teacher"]):
        fields.append(f"base_model: {match[1]}")
        is_lora = description["recipe"]["lora_rank"] > 0
        fields.append(f"base_model_relation: {'adapter' if is_lora else 'finetune'}")

    tags = ["text-to-image", "diffusion2gan", "one-step", "distillation"]
    if description["recipe"]["lora_rank"]:
        tags.append("lora")
    fields.append("tags:")
    fields += [f"- {tag}" for tag in tags]
    return "\n".join(fields)


def format_samples(samples: tuple[tuple[str, str], ...]) -> str:
    """A table of the sample images with their prompts."""
    if not samples:
        return ""
    prompts = [markdown_text(prompt) for _, prompt in samples]
    images = [f"![sample]({file})" for file, _ in samples]
    lines = [f"| {' | '.join(row)} |" for row in (images, ["---"] * len(images), prompts)]
    return "\n" + "\n".join(lines) + "\n"


def read_licence(teacher: Teacher) -> dict[str, str]:
    """The licence's fields in the teacher's model card (README.md): `license`, `license_name`, …"""
    if teacher.folder is None:
        return {}
    folder = teacher.folder if teacher.folder.is_dir() else teacher.folder.parent
    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = card.read_text("utf-8", errors="replace")
    front = re.match(r"\ufeff?---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    if front is None:
        return {}
    return {name: value.strip("\"'") for name, value in LICENCE_FIELD.findall(front[1])}


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
