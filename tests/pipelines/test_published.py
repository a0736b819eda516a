"""Published systems on tiny random models: their settings, and images by their formulas."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.published import SYSTEMS
from diffusion2gan.pipelines.system import System, load_system
from diffusion2gan.pocket import models

PROMPTS = ["a red ring", "a large blue star on pink"]


def tiny_unet(**more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete SDXL folder: two text encoders, size ids, Euler steps."""
    folder = tmp_path_factory.mktemp("sdxl")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = models.tokenizer()
        text_encoder = models.text_encoder(len(tokenizer))
        width = text_encoder.config.hidden_size
        config = CLIPTextConfig(**{**text_encoder.config.to_dict(), "projection_dim": 16})
        text_encoder_2 = CLIPTextModelWithProjection(config)
        unet = tiny_unet(
            cross_attention_dim=2 * width,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        )
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        )
        vae = models.vae()
        StableDiffusionXLPipeline(
            vae, text_encoder, text_encoder_2, tokenizer, tokenizer, unet, scheduler
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lcm(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete LCM folder: its UNet takes the guidance scale as an input."""
    folder = tmp_path_factory.mktemp("lcm") / "lcm"
    shutil.copytree(tiny_teacher, folder)
    width = models.text_encoder(len(models.tokenizer())).config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tiny_unet(cross_attention_dim=width, time_cond_proj_dim=32).save_pretrained(folder / "unet")
    LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "LatentConsistencyModelPipeline"
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def weights(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UNet files under their published names: the base's weights with one layer changed."""
    folder = tmp_path_factory.mktemp("weights")
    state = UNet2DConditionModel.from_pretrained(sdxl / "unet").state_dict()
    state["conv_out.bias"] = state["conv_out.bias"] + 0.3
    for steps in ("1step_x0", "2step", "4step", "8step"):
        save_file(state, folder / f"sdxl_lightning_{steps}_unet.safetensors")
    save_file(state, folder / "Hyper-SDXL-1step-Unet.safetensors")
    for steps in (1, 4):
        torch.save(state, folder / f"dmd2_sdxl_{steps}step_unet_fp16.bin")
    return folder


def record_unet_calls(system: System, noise: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """Generates an image; returns all timesteps of the UNet's calls, and its first output."""
    timesteps: list[float] = []
    outputs: list[torch.Tensor] = []

    def record(module: object, args: tuple[torch.Tensor, ...], output: object) -> None:
        timesteps.append(float(args[1]))
        outputs.append(output[0])  # type: ignore[index]

    handle = system.pipeline.unet.register_forward_hook(record)
    system.generate(PROMPTS[:1], noise)
    handle.remove()
    return timesteps, outputs[0]


def decode(system: System, latents: torch.Tensor) -> np.ndarray:
    """The image [H, W, 3] in 0 … 255 of one image's latents."""
    vae = system.pipeline.vae
    with torch.no_grad():
        images = vae.decode(latents / vae.config.scaling_factor).sample
    return ((images.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()[0]


def generate_latents(system: System, noise: torch.Tensor) -> torch.Tensor:
    return system.pipeline(
        PROMPTS[:1],
        latents=noise,
        num_inference_steps=system.num_inference_steps,
        guidance_scale=system.guidance_scale,
        output_type="latent",
        **system.call,
    ).images


def test_instaflow_is_one_euler_step(tiny_teacher: Path) -> None:
    system = load_system(f"instaflow-0.9b={tiny_teacher}")
    noise = noise_from_seeds([3], system.latent_shape)
    timesteps, velocity = record_unet_calls(system, noise)
    assert timesteps == [1000]
    assert (system.num_inference_steps, system.guidance_scale) == (1, 0)

    torch.testing.assert_close(generate_latents(system, noise), noise + velocity)
    image = system.generate(PROMPTS[:1], noise)[0]
    assert np.abs(image - decode(system, noise + velocity)).max() <= 1


def test_sd15_is_ddim_with_any_number_of_steps(sd_style_teacher: Path) -> None:
    system = load_system(f"sd15={sd_style_teacher}", 7)
    assert (system.num_inference_steps, system.guidance_scale) == (7, 3)
    assert isinstance(system.pipeline.scheduler, DDIMScheduler)
    plain = load_system(str(sd_style_teacher), 7)
    noise = noise_from_seeds([4], system.latent_shape)
    assert np.array_equal(system.generate(PROMPTS[:1], noise), plain.generate(PROMPTS[:1], noise))


def test_sdxl_lightning_in_one_step_returns_the_unets_output(sdxl: Path, weights: Path) -> None:
    system = load_system(
        f"sdxl-lightning={sdxl}+{weights / 'sdxl_lightning_1step_x0_unet.safetensors'}"
    )
    noise = noise_from_seeds([5], system.latent_shape)
    timesteps, output = record_unet_calls(system, noise)
    assert timesteps == [999]
    assert (system.num_inference_steps, system.guidance_scale) == (1, 0)
    torch.testing.assert_close(generate_latents(system, noise), output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_sdxl_lightning_in_more_steps_predicts_noise(sdxl: Path, weights: Path, steps: int) -> None:
    system = load_system(
        f"sdxl-lightning={sdxl}+{weights / f'sdxl_lightning_{steps}step_unet.safetensors'}"
    )
    noise = noise_from_seeds([6], system.latent_shape)
    timesteps, _ = record_unet_calls(system, noise)
    expected = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    assert system.num_inference_steps == steps and timesteps == expected
    assert system.pipeline.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("dmd2", "dmd2_sdxl_1step_unet_fp16.bin", [399]),
        ("dmd2", "dmd2_sdxl_4step_unet_fp16.bin", [999, 749, 499, 249]),
        ("hyper-sd", "Hyper-SDXL-1step-Unet.safetensors", [800]),
    ],
)
def test_systems_with_fixed_timesteps(
    sdxl: Path, weights: Path, name: str, file: str, expected: list[int]
) -> None:
    system = load_system(f"{name}={sdxl}+{weights / file}")
    noise = noise_from_seeds([7], system.latent_shape)
    timesteps, eps = record_unet_calls(system, noise)
    assert timesteps == expected and system.guidance_scale == 0
    if len(expected) == 1:
        alpha = float(system.pipeline.scheduler.alphas_cumprod[expected[0]])
        x0 = (noise - (1 - alpha) ** 0.5 * eps) / alpha**0.5
        torch.testing.assert_close(generate_latents(system, noise), x0, rtol=1e-3, atol=1e-3)


def test_sdxl_turbo_starts_at_the_last_timestep(sdxl: Path) -> None:
    system = load_system(f"sdxl-turbo={sdxl}")
    noise = noise_from_seeds([8], system.latent_shape)
    timesteps, eps = record_unet_calls(system, noise)
    assert timesteps == [999] and system.guidance_scale == 0
    sigma = float(system.pipeline.scheduler.sigmas[0])
    start = noise * float(system.pipeline.scheduler.init_noise_sigma)
    torch.testing.assert_close(
        generate_latents(system, noise), start - sigma * eps, rtol=1e-3, atol=1e-3
    )


def test_sdxl_and_lcm_generate_images(sdxl: Path, lcm: Path) -> None:
    for name, steps, guidance in ((f"sdxl={sdxl}", 50, 5.0), (f"lcm={lcm}", 4, 8.0)):
        system = load_system(name)
        assert (system.num_inference_steps, system.guidance_scale) == (steps, guidance)

    system = load_system(f"sdxl={sdxl}", 2)
    images = system.generate(PROMPTS, noise_from_seeds([1, 2], system.latent_shape))
    assert images.shape == (2, 32, 32, 3)

    timesteps, _ = record_unet_calls(load_system(f"lcm={lcm}"), noise_from_seeds([9], (4, 8, 8)))
    assert timesteps == [999, 759, 499, 259]


@pytest.mark.parametrize("name", ["lcm", "sdxl-turbo"])
def test_noise_that_a_scheduler_adds_depends_on_the_initial_noise_alone(
    sdxl: Path, lcm: Path, name: str
) -> None:
    folder = lcm if name == "lcm" else sdxl
    system = load_system(f"{name}={folder}", 3)
    noise = noise_from_seeds([1, 2], system.latent_shape)

    batch = system.generate(PROMPTS, noise)
    again = system.generate(PROMPTS, noise)
    single = system.generate(PROMPTS[1:], noise[1:])
    assert np.array_equal(batch, again)
    assert np.abs(single[0].astype(int) - batch[1]).max() <= 1


def test_keys_of_published_systems_differ(sdxl: Path, weights: Path) -> None:
    lightning = f"sdxl-lightning={sdxl}+{weights / 'sdxl_lightning_4step_unet.safetensors'}"
    dmd2 = f"dmd2={sdxl}+{weights / 'dmd2_sdxl_4step_unet_fp16.bin'}"
    systems = [
        load_system(f"sdxl={sdxl}", 4),
        load_system(f"sdxl-turbo={sdxl}", 4),
        load_system(f"sdxl-turbo={sdxl}"),
        load_system(lightning),
        load_system(dmd2),
    ]
    assert len({system.key for system in systems}) == 5


def test_wrong_names_and_files_are_reported(
    sdxl: Path, tiny_teacher: Path, weights: Path, tmp_path: Path
) -> None:
    lightning = weights / "sdxl_lightning_4step_unet.safetensors"
    damaged = tmp_path / "cut_1step.safetensors"
    damaged.write_bytes(lightning.read_bytes()[:1000])

    for name, steps, message in (
        (f"sdxl-lihgtning={sdxl}", None, "did you mean 'sdxl-lightning'"),
        (f"sdxl-lightning={sdxl}", None, "its base pipeline and its weights"),
        (f"sdxl-turbo={sdxl}+{lightning}", None, "write it as sdxl-turbo=FOLDER"),
        (f"sdxl-lightning={sdxl}+{lightning}", 2, "is for 4 steps, but --num-inference-steps is 2"),
        (f"sdxl-turbo={sdxl}", 9, "is made for 1, 2, 3, 4 steps, not for 9"),
        (f"sdxl-lightning={tiny_teacher}+{lightning}", None, "does not fit the pipeline's UNet"),
        (f"sdxl-lightning={sdxl}+{tmp_path / 'none.safetensors'}", None, "is not a weights file"),
        (f"sdxl-lightning={sdxl}+{damaged}", None, "cannot be read"),
        (f"gigagan={sdxl}", None, "no weights are public"),
    ):
        with pytest.raises(UserError, match=message):
            load_system(name, steps)

    with pytest.raises(UserError, match="runs without guidance"):
        load_system(f"sdxl-turbo={sdxl}", guidance_scale=5.0)
    assert all(row.steps for row in SYSTEMS.values())


def test_lora_is_merged_into_its_base(sdxl: Path, tmp_path: Path) -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"

    # A published LoRA of one layer
    base = load_system(f"sdxl={sdxl}", 2)
    weight = base.pipeline.unet.get_submodule(layer).weight
    with torch.random.fork_rng():
        torch.manual_seed(6)
        down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    lora = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    save_file(lora, tmp_path / "Hyper-SDXL-2steps-lora.safetensors")
    save_file(lora, tmp_path / "Hyper-SDXL-1step-lora.safetensors")
    name = f"hyper-sd-lora={sdxl}+{tmp_path / 'Hyper-SDXL-2steps-lora.safetensors'}"
    if importlib.util.find_spec("peft") is None:
        with pytest.raises(UserError, match="needs the package peft: pip install peft"):
            load_system(name)
        pytest.skip("peft is not installed")

    # W + B·A, and DDIM
    system = load_system(name)
    torch.testing.assert_close(system.pipeline.unet.get_submodule(layer).weight, weight + up @ down)
    timesteps, _ = record_unet_calls(system, noise_from_seeds([3], system.latent_shape))
    assert timesteps == [999, 499]
    assert isinstance(system.pipeline.scheduler, DDIMScheduler)

    # The LoRA for one step passes `eta` to the pipeline
    one_step = load_system(
        f"hyper-sd-lora-1step={sdxl}+{tmp_path / 'Hyper-SDXL-1step-lora.safetensors'}"
    )
    assert one_step.call == {"eta": 1.0}
    images = one_step.generate(PROMPTS, noise_from_seeds([1, 2], one_step.latent_shape))
    assert len(images) == 2
