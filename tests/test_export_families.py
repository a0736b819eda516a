"""pairs → distill → export → stock diffusers without this package, for a tiny model per family."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import ONE_EACH, RESOLUTION, SIZE
from torch import Tensor

from diffusion2gan.distill.run import load_student
from diffusion2gan.distill.student import Student
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import UserError
from diffusion2gan.export import export
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.make import make_pairs
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe, parse_recipe
from diffusion2gan.teacher.families import pack, unpack
from diffusion2gan.teacher.loading import load_teacher

PROMPTS = ["a red ring on a blue ground", "two stars"]
STOCK = """
import json, sys, torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file, save_file
noise, out, base, size = load_file(sys.argv[1])["noise"], sys.argv[2], sys.argv[3], int(sys.argv[4])
found = {}
for folder in sys.argv[5:]:
    lora = folder.endswith("#lora")
    source = base if lora else folder
    index = json.load(open(source + "/model_index.json"))
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(source, **absent)
    if lora:
        kind = LCMScheduler if hasattr(pipe, "unet") else FlowMatchEulerDiscreteScheduler
        export = folder.removesuffix("#lora")
        pipe.scheduler = kind.from_pretrained(export, subfolder="scheduler")
        pipe.load_lora_weights(export, weight_name="pytorch_lora_weights.safetensors")
    options = {"use_resolution_binning": False} if type(pipe).__name__ == "SanaPipeline" else {}
    def generate(steps):
        return pipe(["a red ring on a blue ground", "two stars"], latents=noise, height=size,
            width=size, num_inference_steps=steps, guidance_scale=0, output_type="latent",
            **options).images
    found[folder] = generate(1)
    for steps in (2, 4):
        try:
            found[f"{folder}:{steps}"] = generate(steps)
        except (ValueError, IndexError) as error:
            print("refused:", error)
assert "diffusion2gan" not in sys.modules
save_file(found, out)
"""
Folder = Callable[[str], Path]


def train(name: str, folder: Path, root: Path, **settings: Any) -> Path:
    """A run of three steps: the averaged weights are neither the teacher's nor the last.

    At the resolution of the family `name`, or the teacher's own for another name.
    """
    # Pairs
    teacher = load_teacher(str(folder), resolution=RESOLUTION.get(name))
    guidance = 3.0 if teacher.guidance == "classifier_free" else 0.0
    spec = PairsSpec(
        teacher.name, teacher.revision, "words", 4, 0, 2, guidance, teacher.latent_shape, 4
    )
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, root / "pairs")

    # Training
    recipe = Recipe(
        teacher=str(folder),
        resolution=RESOLUTION.get(name),
        loss="mse",
        total_pairs=6,
        batch_size=2,
        learning_rate=1e-2,
        adversarial_weight=0,
        **settings,
    )
    distill(recipe, root / "pairs", root / "run")
    return root / "run"


def run_stock_diffusers(
    folders: list[Path], base: Path, noise: Tensor, size: int, tmp_path: Path
) -> tuple[dict[str, Tensor], str]:
    """Latents of `folders` from a process without this package, and the text it printed."""
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    paths = [
        str(tmp_path / "noise.safetensors"),
        str(tmp_path / "found.safetensors"),
        str(base),
        str(size),
    ]

    # The environment without this package's source
    libraries = []
    for path in os.environ.get("PYTHONPATH", "").split(":"):
        if path and not path.endswith("src"):
            libraries.append(path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(libraries)}

    done = subprocess.run(
        [sys.executable, "-c", STOCK, *paths, *map(str, folders)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "found.safetensors"), done.stdout


def expected_latents(run: Path, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of the student with its averaged weights, and of the untrained student."""
    teacher, average, description = load_student(run)
    student = Student.from_recipe(parse_recipe(description["recipe"], ""), teacher)
    student.trained.load_state_dict(average)
    cond = teacher.encode(PROMPTS)
    with torch.no_grad():
        return student(noise, cond), teacher.denoise(noise, teacher.last_timestep, cond)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square error relative to the root mean square of `expected`."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


# A UNet and a transformer; all others are slow tests
QUICK = (("sd15", "full"), ("sd3", "full"))
CASES = [
    pytest.param(
        name, kind, id=f"{name}-{kind}", marks=[] if (name, kind) in QUICK else [pytest.mark.slow]
    )
    for name in (*ONE_EACH, "sd21_zero_snr", "sd3_without_t5", "flux_schnell")
    for kind in ("full", "lora")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_stock_diffusers_reproduces_the_student(
    name: str, kind: str, family_folder: Folder, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {}
    if kind == "lora":
        pytest.importorskip("peft")
        settings = {"lora_rank": 2}
    base = family_folder(name)
    run = train(name, base, tmp_path, **settings)
    export(run, tmp_path / "export")
    folders = [tmp_path / "export"]
    if kind == "lora":
        folders.append(tmp_path / "export#lora")

    # The student in this process
    channels = load_student(run)[0].latent_shape[0]
    noise = noise_from_seeds([1, 2], (channels, SIZE, SIZE))
    expected, initial = expected_latents(run, noise)
    assert relative_error(initial, expected) > 1e-4  # training had an effect

    # Stock diffusers, with 1, 2 and 4 steps: the same latents, or an error
    is_flux = name.startswith("flux")
    inputs = pack(noise).contiguous() if is_flux else noise
    found, output = run_stock_diffusers(folders, base, inputs, RESOLUTION[name], tmp_path)
    for key, latents in found.items():
        latents = unpack(latents, (SIZE, SIZE)) if is_flux else latents
        assert relative_error(latents, expected) < 1e-5, key
    assert output.count("refused:") + len(found) == 3 * len(folders)


def test_lora_trains_only_its_own_weights(family_folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    teacher = load_teacher(str(family_folder("sdxl")))
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    student = Student(teacher, lora_rank=2, lora_targets=["to_q", "to_out.0"])
    noise, cond = noise_from_seeds([1], teacher.latent_shape), teacher.encode(PROMPTS[:1])

    # The LoRA is initialised to zero
    initial = teacher.denoise(noise, teacher.last_timestep, cond)
    assert torch.equal(student(noise, cond), initial)

    # Only the LoRA of the target layers is trained
    student(noise, cond).square().sum().backward()
    trained = dict(student.trained.named_parameters())
    assert trained
    assert all("lora_" in key and ("to_q" in key or "to_out" in key) for key in trained)
    num_trained = sum(p.numel() for p in trained.values())
    assert num_trained < 0.1 * sum(p.numel() for p in teacher.network.parameters())
    for key, parameter in student.network.named_parameters():
        assert "lora_" in key or parameter.grad is None, key

    # The teacher's weights do not change, and are not copied
    with torch.no_grad():
        for parameter in student.trained.parameters():
            parameter += 0.1
    assert teacher.network.state_dict().keys() == before.keys() == student.fused().keys()
    for key, value in teacher.network.state_dict().items():
        assert torch.equal(before[key], value), key
    teacher_pointers = {p.data_ptr() for p in teacher.network.parameters()}
    frozen = [p for p in student.network.parameters() if not p.requires_grad]
    assert {p.data_ptr() for p in frozen} <= teacher_pointers


def test_unknown_lora_targets_are_reported(family_folder: Folder) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"the teacher has no layer named 'to_z'"):
        Student(load_teacher(str(family_folder("sd15"))), lora_rank=2, lora_targets=["to_z"])


def test_model_card_contains_teacher_licence_size_metrics_and_lora(
    family_folder: Folder, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    base = tmp_path / "my-sd3"
    shutil.copytree(family_folder("sd3_without_t5"), base)
    (base / "README.md").write_text("---\nlicense: some-community-licence\n---\n# A model\n")
    run = train("sd3", base, tmp_path, lora_rank=2)
    (run / "metrics.json").write_text('{"frechet_distance": 12.5}')
    export(run, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text().replace("\\_", "_")
    for text in (
        "license: some-community-licence",
        "my-sd3",
        "height=64, width=64",
        "text_encoder_3=None, tokenizer_3=None",
        "load_lora_weights",
        "FlowMatchEulerDiscreteScheduler.from_pretrained",
        "frechet_distance 12.5",
        "rank 2",
    ):
        assert text in card, text
