"""What other programs find in an export: the teacher's files, schedulers, single files, LoRAs.

References: the teacher's files byte for byte, the student in memory, and diffusers' own readers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from cli.runner import assert_refused, run
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher.test_strict_loading import save_lora
from test_export_families import train
from tiny_families import kl
from torch import Tensor

from diffusion2gan.distill.run import load_student
from diffusion2gan.distill.student import Student
from diffusion2gan.export import export, write_lora, write_pipeline
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.recipe import parse_recipe
from diffusion2gan.single_file import (
    UNET_PREFIX,
    VAE_PREFIX,
    add_prefix,
    open_clip_tensors,
    unet_tensors,
    vae_tensors,
    write_single_file,
)
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.one_step import COMPATIBLE
from diffusion2gan.teacher.pipeline import Teacher

Folder = Callable[[str], Path]
PROMPTS = ["a red ring on a blue ground", "two stars"]


def student_weights(teacher: Teacher) -> dict[str, Tensor]:
    """The teacher's weights, slightly changed."""
    weights = {}
    generator = torch.Generator().manual_seed(1)
    for key, value in teacher.network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        weights[key] = value + 0.02 * noise
    return weights


def write_student(
    folder: Path, out: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Teacher:
    """Exports a changed teacher; `options` are those of `load_teacher`, and `variant`."""
    variant = options.pop("variant", None)
    teacher = load_teacher(str(folder), **options)
    write_pipeline(teacher, student_weights(teacher), out, dtype, variant)
    return teacher


def files_of(folder: Path) -> dict[str, bytes]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def stock_images(
    folder: Path, scheduler: str | None = None, call: dict[str, Any] | None = None, **options: Any
) -> np.ndarray:
    """Images [B, H, W, 3] in grey levels by stock diffusers in one step."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        kind = getattr(diffusers, scheduler)
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    settings = {"num_inference_steps": 1, "guidance_scale": 0, **(call or {})}
    noise = noise_from_seeds([1, 2], (4, 8, 8))
    images = pipeline(PROMPTS, latents=noise, output_type="np", **settings).images
    return np.asarray(images * 255)


# The teacher's files


@pytest.fixture
def published(family_folder: Folder, tmp_path: Path) -> Path:
    """A teacher's folder as it is on a hub: with files that no library of today writes."""
    folder = tmp_path / "published"
    shutil.copytree(family_folder("sd15"), folder)
    (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "vae" / ".gitattributes").write_text("hidden")
    for name, kind in (
        ("safety_checker", ["stable_diffusion", "StableDiffusionSafetyChecker"]),
        ("feature_extractor", ["transformers", "CLIPFeatureExtractor"]),
    ):
        (folder / name).mkdir()
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, name: kind}))
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 32, "size": 32}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(settings))

    # The names that transformers wrote before 5.6
    file = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{k}": v for k, v in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_untouched_parts_are_copied_byte_for_byte(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    write_student(published, out)
    for name in ("text_encoder", "tokenizer", "vae"):
        expected = files_of(published / name)
        expected.pop("pytorch_model.bin", None)
        expected.pop(".gitattributes", None)
        assert files_of(out / name) == expected
    assert not (out / "feature_extractor").exists() and not (out / "safety_checker").exists()

    # The index: the teacher's entries, without the checker
    index = json.loads((out / "model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert DiffusionPipeline.from_pretrained(out).unet.config.sample_size == 8


def test_half_precision_keeps_the_names(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    write_student(published, out, torch.float16)
    for name in ("text_encoder/model", "vae/diffusion_pytorch_model"):
        expected = load_file(published / f"{name}.safetensors")
        found = load_file(out / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value.half()) for key, value in expected.items())


def test_changed_parts_are_written(family_folder: Folder, tmp_path: Path) -> None:
    # Another VAE: its files
    kl(4, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    write_student(family_folder("sd15"), tmp_path / "export", vae=str(tmp_path / "vae"))
    assert files_of(tmp_path / "export" / "vae") == files_of(tmp_path / "vae")

    # A LoRA merged into the text encoder: its weights, under the names of transformers 4
    pytest.importorskip("peft")
    save_lora(family_folder("sd15"), tmp_path / "lora.safetensors", "text_encoder")
    teacher = write_student(
        family_folder("sd15"), tmp_path / "merged", loras=str(tmp_path / "lora.safetensors")
    )
    merged = load_file(tmp_path / "merged" / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in merged)
    encoder = DiffusionPipeline.from_pretrained(tmp_path / "merged").text_encoder
    for key, value in teacher.pipeline.text_encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], value), key
    original = load_teacher(str(family_folder("sd15"))).pipeline.text_encoder.state_dict()
    assert any(not torch.equal(encoder.state_dict()[k], v) for k, v in original.items())
    vae = family_folder("sd15") / "vae"
    assert files_of(tmp_path / "merged" / "vae") == files_of(vae)


@pytest.mark.parametrize("shards", [pytest.param("5GB", marks=pytest.mark.slow), "20KB"])
def test_variants(shards: str, family_folder: Folder, tmp_path: Path) -> None:
    """An export with a variant, and the export of a teacher that has one."""
    teacher = tmp_path / "teacher"
    pipeline = DiffusionPipeline.from_pretrained(family_folder("sd15")).to(torch.float16)
    pipeline.save_pretrained(teacher, variant="fp16", max_shard_size=shards)

    write_student(teacher, tmp_path / "plain")
    write_student(teacher, tmp_path / "fp16", torch.float16, variant="fp16")
    for out, variant in (("plain", None), ("fp16", "fp16")):
        names = [path.name for path in (tmp_path / out).rglob("*.safetensors")]
        assert all((".fp16" in name) == (variant is not None) for name in names), names
        found = DiffusionPipeline.from_pretrained(
            tmp_path / out, variant=variant, torch_dtype=torch.float16
        )
        for name in ("vae", "text_encoder"):
            expected = getattr(pipeline, name).state_dict()
            for key, value in getattr(found, name).state_dict().items():
                assert torch.equal(value, expected[key]), (out, name, key)
        load_system(str(tmp_path / out))


def test_student_that_is_not_square(family_folder: Folder, tmp_path: Path) -> None:
    for name in ("sd15", "sdxl"):
        folder = tmp_path / name
        shutil.copytree(family_folder(name), folder)
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": [8, 12]}))
        run_folder = train("native", folder, tmp_path / f"{name}_run")
        out = tmp_path / f"{name}_export"
        snippet = export(run_folder, out)
        config = json.loads((out / "unet" / "config.json").read_text())
        assert config["sample_size"] == [8, 12]
        assert load_system(str(out)).image_size == (64, 96)

        # The card's code, as it is printed
        assert "height=64, width=96" in snippet
        assert "height=64, width=96" in (out / "README.md").read_text()
        scope: dict[str, Any] = {}
        exec(snippet, scope)
        assert scope["image"].size == (96, 64)
        assert Image.open(out / "samples" / "0.png").size == (96, 64)


# Schedulers


@pytest.fixture(scope="module")
def exports(family_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name in ("sd15", "sdxl"):
        write_student(family_folder(name), root / name)
    return {name: root / name for name in ("sd15", "sdxl")}


@pytest.mark.parametrize("scheduler", COMPATIBLE)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_schedulers_give_the_same_image(
    name: str, scheduler: str, exports: dict[str, Path]
) -> None:
    expected = stock_images(exports[name])
    found = stock_images(exports[name], scheduler)
    assert np.abs(found - expected).max() <= 1.0
    assert expected.std() > 5  # not a plain colour


def test_lcm_scheduler_is_unchanged(family_folder: Folder, exports: dict[str, Path]) -> None:
    """The same latents, bit for bit, as with the teacher's spacing and its sampler's settings."""
    teacher = load_teacher(str(family_folder("sd15")))
    before = diffusers.LCMScheduler.from_config(
        teacher.scheduler.config, original_inference_steps=1, clip_sample=False
    )
    now = diffusers.LCMScheduler.from_pretrained(exports["sd15"], subfolder="scheduler")
    assert before.config.timestep_spacing == "leading" and now.config.timestep_spacing == "trailing"
    noise, output = noise_from_seeds([1, 2], (4, 8, 8)), noise_from_seeds([3, 4], (4, 8, 8))
    latents = []
    for scheduler in (before, now):
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [999]
        latents.append(scheduler.step(output, 999, noise).prev_sample)
    assert torch.equal(*latents)


def test_other_settings_are_on_the_card(
    exports: dict[str, Path], family_folder: Folder, tmp_path: Path
) -> None:
    """Two steps raise in words; guidance changes the image without an error."""
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`: 2"):
        stock_images(exports["sd15"], call={"num_inference_steps": 2})
    guided = stock_images(exports["sd15"], call={"guidance_scale": 5.0})
    assert np.abs(guided - stock_images(exports["sd15"])).max() > 1
    two_steps = stock_images(exports["sd15"], "DDIMScheduler", {"num_inference_steps": 2})
    assert np.abs(two_steps - stock_images(exports["sd15"])).max() > 1


# One file


def test_full_size_names_are_those_of_the_original_code() -> None:
    """Stable Diffusion 1.5's and SDXL's networks on the device meta, read back by diffusers."""
    sdxl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for config, count in (({"cross_attention_dim": 768}, 686), (sdxl, 1680)):
        with torch.device("meta"):
            network = UNet2DConditionModel(**config)
        weights = network.state_dict()
        named = add_prefix(UNET_PREFIX, unet_tensors(weights, network.config))
        assert len(named) == count  # of the published checkpoints
        found = convert_ldm_unet_checkpoint(named, network.config)
        assert found.keys() == weights.keys()
        assert all(found[key] is value for key, value in weights.items())
    assert "model.diffusion_model.output_blocks.2.2.conv.weight" in named  # SDXL's first upsampler
    assert "model.diffusion_model.label_emb.0.0.weight" in named

    vae = kl(4)
    weights = vae.state_dict()
    found = convert_ldm_vae_checkpoint(add_prefix(VAE_PREFIX, vae_tensors(weights, 4)), vae.config)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


# The others are slow tests
QUICK = (("sd15", "float32"), ("sd21_zero_snr", "float32"), ("sdxl", "float16"), ("sd3", "float32"))
SINGLE_FILES = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else [pytest.mark.slow])
    for name in ("sd15", "sd21_zero_snr", "sdxl", "sd3", "flux_dev")
    for dtype in ("float32", "float16")
]


@pytest.mark.parametrize(("name", "precision"), SINGLE_FILES)
def test_single_file_is_the_student(
    name: str, precision: str, family_folder: Folder, tmp_path: Path
) -> None:
    """Read by diffusers' `from_single_file` alone."""
    dtype = getattr(torch, precision)
    teacher = load_teacher(str(family_folder(name)))
    student = student_weights(teacher)
    file = tmp_path / "student.safetensors"
    write_single_file(teacher, student, file, dtype)
    assert {tensor.dtype for tensor in load_file(file).values()} <= {dtype, torch.float32}

    config = str(family_folder(name))
    network = teacher.family.network
    expected = {network: student}
    if network == "transformer":
        kind: Any = type(teacher.network)
        network_found = kind.from_single_file(str(file), config=config, subfolder=network)
        found = {network: network_found.state_dict()}
    else:
        options = {} if name == "sdxl" else {"safety_checker": None}
        pipeline = type(teacher.pipeline).from_single_file(str(file), config=config, **options)
        for part in ("vae", "text_encoder", "text_encoder_2"):
            if hasattr(teacher.pipeline, part):
                expected[part] = getattr(teacher.pipeline, part).state_dict()
        found = {part: getattr(pipeline, part).state_dict() for part in expected}
    for part, weights in expected.items():
        for key, value in weights.items():
            assert torch.equal(found[part][key].float(), value.to(dtype).float()), (part, key)

    # v prediction is marked, as ComfyUI reads it
    marks = {"v_pred", "ztsnr"} & set(load_file(file))
    assert marks == ({"v_pred", "ztsnr"} if name == "sd21_zero_snr" else set())


def test_open_clip_layout_of_stable_diffusion_2(family_folder: Folder) -> None:
    """One attention layer in OpenCLIP's layout computes what CLIP's does."""
    encoder = load_teacher(str(family_folder("sdxl"))).pipeline.text_encoder_2
    tensors = open_clip_tensors(encoder.state_dict())
    width = encoder.config.hidden_size
    attention = torch.nn.MultiheadAttention(width, encoder.config.num_attention_heads)
    prefix = "transformer.resblocks.0.attn."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    attention.load_state_dict(weights)
    x = torch.randn(5, width)
    layer = encoder.text_model.encoder.layers[0].self_attn
    with torch.no_grad():
        found = attention(x, x, x)[0]
        expected = layer(x[None])[0][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tensors["text_projection"], encoder.text_projection.weight.T)


# LoRA


def test_lora_files_at_the_root(family_folder: Folder, tmp_path: Path) -> None:
    """Both files, loaded by stock diffusers into the teacher, give the student's layers."""
    pytest.importorskip("peft")
    for name in ("sd15", "sdxl"):
        teacher = load_teacher(str(family_folder(name)))
        student = Student(teacher, lora_rank=2, lora_targets=["to_q", "to_out.0"])
        with torch.no_grad():
            for i, parameter in enumerate(student.trained.parameters()):
                generator = torch.Generator().manual_seed(i)
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        lora = student.lora()
        assert lora is not None
        write_lora(teacher, lora, tmp_path, torch.float32)
        expected = student.fused()

        for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
            pipeline = DiffusionPipeline.from_pretrained(family_folder(name))
            pipeline.load_lora_weights(tmp_path, weight_name=file)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
            for key, value in pipeline.unet.state_dict().items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
        assert any(not torch.equal(expected[k], v) for k, v in teacher.network.state_dict().items())

        # kohya's names: this layer is in every Stable Diffusion
        names = set(load_file(tmp_path / "lora_kohya.safetensors"))
        layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
        assert {
            f"{layer}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
        } <= names


# The job and its card


@pytest.fixture(scope="module")
def trained(family_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a teacher from a hub's cache folder, with a licence."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(family_folder("sd15"), root / "teacher")
    (root / "teacher" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: my-licence\nlicense_link: https://example.org/l\n---\n"
    )
    return train("sd15", root / "teacher", root)


def test_command_writes_everything(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "my_student"
    (tmp_path / "prompts.txt").write_text("a red | ring\ntwo *stars*\n")
    (trained / "metrics.json").write_text('{"clip_score": 0.25}')
    options = ("--single-file", "--variant", "fp16", "--sample-prompts", tmp_path / "prompts.txt")
    result = run("export", trained, "--out", out, *options)
    assert result.code == 0, result.err

    # The printed code runs, and is the card's but for the path
    card = ModelCard.load(out / "README.md")
    snippet = result.out.partition("to use it,\n\n")[2].strip()
    assert snippet.replace(str(out), "PATH/TO/THIS/FOLDER") in card.content
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    assert scope["image"].size == (64, 64)

    # The fields that hubs read
    fields = card.data.to_dict()
    assert fields["license"] == "other" and fields["license_name"] == "my-licence"
    assert fields["license_link"] == "https://example.org/l"
    assert fields["pipeline_tag"] == "text-to-image" and "one-step" in fields["tags"]
    assert "base_model" not in fields  # a folder is none that a hub has

    # What the card says
    for text in (
        "raises a ValueError at two or more steps",
        *COMPATIBLE,
        "`guidance_scale=0`",
        "`negative_prompt`",
        "No safety checker",
        r"clip\_score 0.25",
        "my_student.safetensors",
        "| a red &#124; ring | two \\*stars\\* |",
    ):
        assert text in card.content, text
    samples = sorted(path.name for path in (out / "samples").iterdir())
    assert samples == ["0.png", "1.png"]
    assert load_file(out / "my_student.safetensors")

    # The sample is the student's image
    teacher, average, description = load_student(trained)
    student = Student.from_recipe(parse_recipe(description["recipe"], ""), teacher)
    student.trained.load_state_dict(average)
    with torch.no_grad():
        noise = noise_from_seeds([1], teacher.latent_shape)
        image = teacher.decode(student(noise, teacher.encode(["two *stars*"])))[0]
    pixels = np.asarray(Image.open(out / "samples" / "1.png"), float)
    np.testing.assert_allclose(pixels, ((image + 1) * 127.5).permute(1, 2, 0).numpy(), atol=0.51)


def test_base_model_of_a_hub_teacher(trained: Path, tmp_path: Path) -> None:
    from diffusion2gan.model_card import Contents, model_card

    teacher, _, description = load_student(trained)
    name = "org/name@0123456789abcdef0123456789abcdef01234567"
    description["pairs"]["teacher"] = name
    (tmp_path / "README.md").write_text(model_card(description, teacher, Contents()))
    fields = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert fields["base_model"] == "org/name" and fields["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variant", "fp8"), "only fp16 is supported"),
        (("--push-to-hub", "name"), "write it as ORG/NAME"),
        (("--private",), "belongs to --push-to-hub"),
        (("--no-samples", "--sample-prompts", "x"), "exclude each other"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[str, ...], message: str, trained: Path, tmp_path: Path
) -> None:
    assert_refused(run("export", trained, "--out", tmp_path / "out", *options), 2, message)
    assert not (tmp_path / "out").exists()


# A hub


class Hub(BaseHTTPRequestHandler):
    """The part of a model hub's interface that an upload uses; what it receives is in `files`."""

    files: dict[str, bytes] = {}
    requests: list[str] = []
    token = "Bearer hf_right"

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}/org/name"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append(f"POST {self.path}")
        if self.headers.get("Authorization") != self.token:
            self.reply(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self.reply(200, {"url": self.address, "name": json.loads(body)["name"]})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = b64decode(entry["value"]["content"])
            commit = {"commitUrl": f"{self.address}/commit/1", "commitOid": "1", "success": True}
            self.reply(200, {**commit, "pullRequestUrl": None})
        else:
            self.reply(200, {})

    def do_GET(self) -> None:
        self.requests.append(f"GET {self.path}")
        self.reply(200, {"id": "org/name", "sha": "0", "siblings": []})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files.clear()
    Hub.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_push_to_hub_uploads_the_folder(hub: str, trained: Path, tmp_path: Path) -> None:
    """In a process, because huggingface_hub reads its settings when it is imported."""
    out = tmp_path / "export"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "diffusion2gan", "export", str(trained), "--out", str(out)]
    done = subprocess.run(
        [*command, "--no-samples", "--push-to-hub", "org/name"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub}/org/name" in done.stdout
    assert Hub.files == files_of(out)
    assert "README.md" in Hub.files and "unet/diffusion_pytorch_model.safetensors" in Hub.files


def test_refused_push_keeps_the_export(
    hub: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    out = tmp_path / "export"

    # Nothing is sent without the option
    assert run("export", trained, "--out", out).code == 0
    assert Hub.requests == []

    result = run("export", trained, "--out", out, "--push-to-hub", "org/name")
    assert_refused(result, 1, "is complete, but it could not be pushed to org/name", "401")
    assert Hub.requests and not any("/commit/" in request for request in Hub.requests)
    assert (out / "model_index.json").is_file()
