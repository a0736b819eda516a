"""Every family's ODE, encoder and decoder against its own stock pipeline; what is refused by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_families import FAMILIES, ONE_EACH, RESOLUTION, SIZE
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.teacher.families import pack, unpack
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.ode import solve_ode

PROMPTS = ["a red ring on a blue ground", "two stars"]
Folder = Callable[[str], Path]


def stock(folder: Path) -> Any:
    """The stock pipeline with the deterministic first-order solver of its kind, built here by hand."""
    without = (
        {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3_without_t5" else {}
    )
    pipeline = DiffusionPipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    if folder.name.startswith("sd1") or folder.name.startswith("sd2") or folder.name == "sdxl":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if folder.name == "sana":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipeline


def stock_call(pipeline: Any, noise: Tensor, **options: Any) -> Tensor:
    """Its latents [B, C, h, w], whatever layout and size it thinks of."""
    size = RESOLUTION["sana" if type(pipeline).__name__ == "SanaPipeline" else "sd15"]
    accepted = inspect.signature(pipeline.__call__).parameters
    options |= {"use_resolution_binning": False} if "use_resolution_binning" in accepted else {}
    packed = type(pipeline).__name__ == "FluxPipeline"
    if packed:
        noise = pipeline._pack_latents(noise, len(noise), 16, SIZE, SIZE)
    out = pipeline(
        PROMPTS, latents=noise, height=size, width=size, output_type="latent", **options
    ).images
    return pipeline._unpack_latents(out, size, size, 8) if packed else out


def load(folder: Path) -> Any:
    return load_teacher(str(folder), resolution=RESOLUTION[folder.name])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("steps", "guidance_scale"), [(10, 3.0), (50, 3.0), (10, 0.0)])
def test_the_ode_is_the_stock_pipelines(
    name: str, steps: int, guidance_scale: float, family_folder: Folder
) -> None:
    if name == "flux_schnell" and guidance_scale > 0:
        pytest.skip("it has no guidance; test_a_teacher_without_guidance_refuses_one")
    if name not in ONE_EACH and steps == 50:
        pytest.skip("fifty steps of one member of each family are enough")
    folder = family_folder(name)
    teacher = load(folder)
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    expected = stock_call(
        stock(folder), noise, num_inference_steps=steps, guidance_scale=guidance_scale
    )
    uncond = teacher.unconditional().expand(2)
    found = solve_ode(teacher, noise, teacher.encode(PROMPTS), uncond, steps, guidance_scale)
    assert found.dtype == torch.float32 and found.isfinite().all()
    scale = max(1.0, float(expected.square().mean().sqrt()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)
    others = solve_ode(teacher, noise, teacher.encode(PROMPTS[::-1]), uncond, steps, guidance_scale)
    assert float((others - expected).abs().max()) > 1e-4 * scale  # the prompt matters


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux_dev", "sana"])
def test_guidance_changes_the_latents(name: str, family_folder: Folder) -> None:
    teacher = load(family_folder(name))
    noise, cond = noise_from_seeds([1], teacher.latent_shape), teacher.encode(PROMPTS[:1])
    a, b = (
        solve_ode(teacher, noise, cond, teacher.unconditional(), 3, scale) for scale in (2.0, 6.0)
    )
    assert float((a - b).abs().max()) > 1e-4


def test_a_teacher_without_guidance_refuses_one(family_folder: Folder) -> None:
    teacher = load(family_folder("flux_schnell"))
    cond = teacher.encode(PROMPTS[:1])
    with pytest.raises(
        UserError, match=r"distilled without guidance.*guidance_scale = 3.*--guidance-scale 0"
    ):
        solve_ode(teacher, noise_from_seeds([1], teacher.latent_shape), cond, cond, 1, 3.0)


@pytest.mark.parametrize("name", ONE_EACH)
def test_latents_are_decoded_as_the_stock_pipeline_does(name: str, family_folder: Folder) -> None:
    teacher, pipeline = load(family_folder(name)), stock(family_folder(name))
    seen: list[Tensor] = []
    pipeline.vae.decode, real = (
        (lambda x, **options: seen.append(x) or real(x, **options)),
        pipeline.vae.decode,
    )
    size = RESOLUTION[name]
    options = {"use_resolution_binning": False} if name == "sana" else {}
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    given = pipeline._pack_latents(noise, 2, 16, SIZE, SIZE) if name == "flux_dev" else noise
    shown = pipeline(
        PROMPTS,
        latents=given,
        height=size,
        width=size,
        num_inference_steps=2,
        guidance_scale=0,
        output_type="pt",
        **options,
    ).images
    latents = stock_call(pipeline, noise, num_inference_steps=2, guidance_scale=0)
    images = teacher.decode(latents)
    assert images.shape[-2:] == teacher.pixels == (size, size)
    torch.testing.assert_close((images + 1) / 2, shown, rtol=0, atol=1e-4)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ONE_EACH)
def test_conditionings_join_and_part_again(name: str, family_folder: Folder) -> None:
    teacher = load(family_folder(name))
    both = teacher.encode(PROMPTS)
    joined = type(both).concat(both.rows(slice(0, 1)), both.rows(slice(1, 2)))
    assert joined.tensors().keys() == both.tensors().keys() and len(joined) == 2
    assert all(torch.equal(joined.tensors()[key], value) for key, value in both.tensors().items())
    many = teacher.unconditional().expand(3)
    assert all(len(value) == 3 for value in many.tensors().values())


def test_sdxls_network_reads_pooled_text_and_sizes(family_folder: Folder) -> None:
    folder = family_folder("sdxl")
    small, large = (load_teacher(str(folder), resolution=side) for side in (64, 128))
    cond = small.encode(PROMPTS)
    assert cond.time_ids is not None and cond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert large.latent_shape == (4, 16, 16) and large.encode(PROMPTS[:1]).time_ids[0, 0] == 128
    noise = noise_from_seeds([1, 2], small.latent_shape)
    answer = small.denoise(noise, 999, cond)
    for name in ("pooled_prompt_embeds", "time_ids"):
        changed = type(cond)(**cond.tensors() | {name: cond.tensors()[name] * 2})
        assert float((small.denoise(noise, 999, changed) - answer).abs().max()) > 1e-4
    assert (
        float(small.unconditional().prompt_embeds.abs().max()) == 0
    )  # force_zeros_for_empty_prompt


def test_tokens_are_packed_and_unpacked_as_flux_does(family_folder: Folder) -> None:
    x, pipeline = (
        torch.arange(2 * 16 * 4 * 6.0).reshape(2, 16, 4, 6),
        stock(family_folder("flux_schnell")),
    )
    assert torch.equal(pack(x), pipeline._pack_latents(x, 2, 16, 4, 6))
    assert torch.equal(unpack(pack(x), (4, 6)), x)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_ends_at_the_networks_x0(name: str, family_folder: Folder) -> None:
    """From the last timestep; Stable Diffusion's leading spacing starts elsewhere, and is left out."""
    teacher = load(family_folder(name))
    if name in ("sd15", "sd21", "sdxl"):
        pytest.skip("its steps do not start at the last timestep")
    noise, cond = noise_from_seeds([3], teacher.latent_shape), teacher.encode(PROMPTS[:1])
    found = solve_ode(teacher, noise, cond, cond, 1, 0.0)
    torch.testing.assert_close(
        found, teacher.denoise(noise, teacher.last_timestep, cond), rtol=1e-5, atol=1e-5
    )


def test_resolutions_that_do_not_fit_are_said(family_folder: Folder) -> None:
    for name, unit in (("sd15", 8), ("flux_dev", 16), ("sd3", 16), ("sana", 32)):
        with pytest.raises(UserError, match=f"resolution {unit + 1}.*steps of {unit} pixels"):
            load_teacher(str(family_folder(name)), resolution=unit + 1)


def altered(folder: Path, to: Path, file: str, **settings: Any) -> Path:
    import shutil

    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return to


def test_models_that_cannot_teach_are_refused_by_name(
    family_folder: Folder, tmp_path: Path
) -> None:
    sd = family_folder("sd15")
    refiner = altered(
        sd, tmp_path / "a", "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"
    )
    with pytest.raises(UserError, match="the SDXL refiner"):
        load_teacher(str(refiner))
    refiner = altered(
        family_folder("sdxl"),
        tmp_path / "b",
        "model_index.json",
        text_encoder=[None, None],
        tokenizer=[None, None],
    )
    with pytest.raises(UserError, match="no text_encoder: it is the SDXL refiner"):
        load_teacher(str(refiner))
    zero_snr = altered(
        sd, tmp_path / "c", "scheduler/scheduler_config.json", rescale_betas_zero_snr=True
    )
    with pytest.raises(UserError, match="ε with zero terminal SNR"):
        load_teacher(str(zero_snr))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "StableDiffusionInpaintPipeline",
            "an inpainting pipeline; give a text-to-image StableDiffusionPipeline",
        ),
        ("StableDiffusion3Img2ImgPipeline", "an image-to-image pipeline"),
        ("FluxKontextPipeline", "an editing pipeline"),
        ("AuraFlowPipeline", "not supported; supported: StableDiffusionPipeline"),
    ],
)
def test_other_pipelines_are_refused_with_what_to_give(
    kind: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match=told) as error:
        load_teacher(str(tmp_path))
    assert "CONTRIBUTING.md" in str(error.value)


def test_a_missing_third_text_encoder_is_said(family_folder: Folder, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(family_folder("sd3"), tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / "text_encoder_3")
    with pytest.raises(UserError, match="text_encoder_3") as error:
        load_teacher(str(tmp_path / "sd3"))
    assert "[null, null]" in str(error.value)


def test_an_inpainting_model_is_refused(tmp_path: Path) -> None:
    from tiny_families import sd15, unet

    pipeline = sd15()
    pipeline.unet = unet(in_channels=9)
    pipeline.save_pretrained(tmp_path / "inpaint")
    with pytest.raises(UserError, match="takes 9 channels, its VAE makes 4: it is an inpainting"):
        load_teacher(str(tmp_path / "inpaint"))
