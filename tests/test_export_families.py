"""Each family, tiny and random: pairs → distill → export → stock diffusers in a process without this package."""

from __future__ import annotations

import os
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
    lora = folder.endswith("/lora")
    source = base if lora else folder
    index = json.load(open(source + "/model_index.json"))
    absent = {part: None for part, kind in index.items() if kind == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(source, **absent)
    if lora:
        kind = LCMScheduler if hasattr(pipe, "unet") else FlowMatchEulerDiscreteScheduler
        pipe.scheduler = kind.from_pretrained(folder.removesuffix("/lora"), subfolder="scheduler")
        pipe.load_lora_weights(folder)
    options = {"use_resolution_binning": False} if type(pipe).__name__ == "SanaPipeline" else {}
    call = lambda steps: pipe(["a red ring on a blue ground", "two stars"], latents=noise, height=size, width=size,
        num_inference_steps=steps, guidance_scale=0, output_type="latent", **options).images
    found[folder] = call(1)
    for steps in (2, 4):
        try:
            found[f"{folder}:{steps}"] = call(steps)
        except (ValueError, IndexError) as error:
            print("refused:", error)
assert "diffusion2gan" not in sys.modules
save_file(found, out)
"""
Folder = Callable[[str], Path]


def run_of(name: str, folder: Path, root: Path, **settings: Any) -> Path:
    """A run of three steps, so that the averaged weights are neither the teacher's nor the last."""
    teacher = load_teacher(str(folder), resolution=RESOLUTION[name])
    guidance = 3.0 if teacher.guidance == "classifier_free" else 0.0
    spec = PairsSpec(
        teacher.name, teacher.revision, "words", 4, 0, 2, guidance, teacher.latent_shape, 4
    )
    make_pairs(teacher, lambda indices: ["a star"] * len(indices), spec, root / "pairs")
    options = {
        "loss": "mse",
        "total_pairs": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "adversarial_weight": 0,
    } | settings
    recipe = Recipe(teacher=str(folder), resolution=RESOLUTION[name], **options)
    distill(recipe, root / "pairs", root / "run")
    return root / "run"


def stock(
    folders: list[Path], base: Path, noise: Tensor, size: int, tmp_path: Path
) -> tuple[dict[str, Tensor], str]:
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    paths = [
        str(tmp_path / "noise.safetensors"),
        str(tmp_path / "found.safetensors"),
        str(base),
        str(size),
    ]
    libraries = [
        path
        for path in os.environ.get("PYTHONPATH", "").split(":")
        if path and not path.endswith("src")
    ]
    outside = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(libraries)}
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *paths, *map(str, folders)],
        capture_output=True,
        text=True,
        env=outside,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "found.safetensors"), done.stdout


def expected_of(run: Path, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What our student answers with its averaged weights, and what the teacher's network answers."""
    teacher, average, described = load_student(run)
    student = Student.from_recipe(parse_recipe(described["recipe"], ""), teacher)
    student.trained.load_state_dict(average)
    cond = teacher.encode(PROMPTS)
    with torch.no_grad():
        return student(noise, cond), teacher.denoise(noise, teacher.last_timestep, cond)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


QUICK = (
    ("sd15", "full"),
    ("sd3", "full"),
)  # a UNet and a transformer; all the others are slow tests
CASES = [
    pytest.param(
        name, kind, id=f"{name}-{kind}", marks=[] if (name, kind) in QUICK else [pytest.mark.slow]
    )
    for name in (*ONE_EACH, "sd21_zero_snr", "sd3_without_t5", "flux_schnell")
    for kind in ("full", "lora")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_stock_diffusers_runs_it_exactly(
    name: str, kind: str, family_folder: Folder, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {}
    if kind == "lora":
        pytest.importorskip("peft")
        settings = {"lora_rank": 2}
    base = family_folder(name)
    run = run_of(name, base, tmp_path, **settings)
    export(run, tmp_path / "export")
    folders = [tmp_path / "export"] + ([tmp_path / "export" / "lora"] if kind == "lora" else [])
    channels = 32 if name == "sana" else 16 if name.startswith(("sd3", "flux")) else 4
    noise = noise_from_seeds([1, 2], (channels, SIZE, SIZE))
    flux = name.startswith("flux")
    given = pack(noise).contiguous() if flux else noise
    found, told = stock(folders, base, given, RESOLUTION[name], tmp_path)
    expected, born = expected_of(run, noise)
    assert difference(born, expected) > 1e-4  # it did learn something
    for key, latents in found.items():
        latents = unpack(latents, (SIZE, SIZE)) if flux else latents
        assert difference(latents, expected) < 1e-5, key
    assert told.count("refused:") + len(found) == 3 * len(folders)


def test_a_lora_trains_and_keeps_its_own_weights_alone(
    family_folder: Folder, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    teacher = load_teacher(str(family_folder("sdxl")))
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    student = Student(teacher, lora_rank=2, lora_targets=["to_q", "to_out.0"])
    noise, cond = noise_from_seeds([1], teacher.latent_shape), teacher.encode(PROMPTS[:1])
    assert torch.equal(
        student(noise, cond), teacher.denoise(noise, teacher.last_timestep, cond)
    )  # born zero
    student(noise, cond).square().sum().backward()
    named = dict(student.trained.named_parameters())
    assert named and all("lora_" in key and ("to_q" in key or "to_out" in key) for key in named)
    assert sum(p.numel() for p in named.values()) < 0.1 * sum(
        p.numel() for p in teacher.network.parameters()
    )
    assert all(
        p.grad is None for key, p in student.network.named_parameters() if "lora_" not in key
    )
    with torch.no_grad():
        for parameter in student.trained.parameters():
            parameter += 0.1
    assert teacher.network.state_dict().keys() == before.keys() == student.fused().keys()
    assert all(
        torch.equal(before[key], value) for key, value in teacher.network.state_dict().items()
    )
    shared = {p.data_ptr() for p in teacher.network.parameters()}
    assert {
        p.data_ptr() for p in student.network.parameters() if not p.requires_grad
    } <= shared  # no second copy


def test_lora_targets_that_are_not_there_are_said(family_folder: Folder) -> None:
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"no layer of the teacher is called 'to_z'"):
        Student(load_teacher(str(family_folder("sd15"))), lora_rank=2, lora_targets=["to_z"])


def test_the_card_tells_teacher_licence_size_and_lora(
    family_folder: Folder, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    import shutil

    base = tmp_path / "my-sd3"
    shutil.copytree(family_folder("sd3_without_t5"), base)
    (base / "README.md").write_text("---\nlicense: some-community-licence\n---\n# A model\n")
    run = run_of("sd3", base, tmp_path, lora_rank=2)
    (run / "metrics.json").write_text('{"frechet_distance": 12.5}')
    export(run, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    for told in (
        "license: some-community-licence",
        "my-sd3",
        "height=64, width=64",
        "text_encoder_3=None, tokenizer_3=None",
        "load_lora_weights",
        "FlowMatchEulerDiscreteScheduler.from_pretrained",
        "frechet_distance 12.5",
        "rank 2",
    ):
        assert told in card, told
