"""Every family's ODE, encoder and decoder against its stock pipeline, and refused models."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_families import FAMILIES, ONE_EACH, RESOLUTION, SIZE, sd15, unet
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.teacher.families import pack, unpack
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.ode import solve_ode
from diffusion2gan.teacher.schedule import Level, Step

PROMPTS = ["a red ring on a blue ground", "two stars"]
Folder = Callable[[str], Path]


def stock(folder: Path) -> Any:
    """The stock pipeline with a deterministic first-order solver, built without this package."""
    options: dict[str, Any] = {}
    if folder.name == "sd3_without_t5":
        options = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)

    if folder.name.startswith(("sd1", "sd2", "sdxl")):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if folder.name == "sana":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipeline


def stock_call(pipeline: Any, noise: Tensor, **options: Any) -> Tensor:
    """Latents [B, C, h, w] of the stock pipeline at the size of the tests."""
    kind = type(pipeline).__name__
    size = RESOLUTION["sana" if kind == "SanaPipeline" else "sd15"]
    if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
        options["use_resolution_binning"] = False
    if kind == "FluxPipeline":
        noise = pipeline._pack_latents(noise, len(noise), 16, SIZE, SIZE)

    latents = pipeline(
        PROMPTS, latents=noise, height=size, width=size, output_type="latent", **options
    ).images
    if kind == "FluxPipeline":
        return pipeline._unpack_latents(latents, size, size, 8)
    return latents


def load(folder: Path) -> Any:
    return load_teacher(str(folder), resolution=RESOLUTION[folder.name])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("steps", "guidance_scale"), [(10, 3.0), (50, 3.0), (10, 0.0)])
def test_ode_matches_the_stock_pipeline(
    name: str, steps: int, guidance_scale: float, family_folder: Folder
) -> None:
    if name == "flux_schnell" and guidance_scale > 0:
        pytest.skip("no guidance; see test_teacher_without_guidance_refuses_it")
    if name not in ONE_EACH and steps == 50:
        pytest.skip("50 steps are tested for one member of each family")
    folder = family_folder(name)
    teacher = load(folder)
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    cond, uncond = teacher.encode(PROMPTS), teacher.unconditional().expand(2)

    # The same latents
    expected = stock_call(
        stock(folder), noise, num_inference_steps=steps, guidance_scale=guidance_scale
    )
    found = solve_ode(teacher, noise, cond, uncond, steps, guidance_scale)
    assert found.dtype == torch.float32 and found.isfinite().all()
    scale = max(1.0, float(expected.square().mean().sqrt()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)

    # The prompt has an effect
    swapped_cond = teacher.encode(PROMPTS[::-1])
    swapped = solve_ode(teacher, noise, swapped_cond, uncond, steps, guidance_scale)
    assert float((swapped - expected).abs().max()) > 1e-4 * scale


def stock_dpm_solver(teacher: Any) -> DPMSolverMultistepScheduler:
    """diffusers' DPM-Solver++(2M), with Karras sigmas or with a flow's sigmas."""
    config = teacher.scheduler.config
    if not teacher.family.flow:
        return DPMSolverMultistepScheduler.from_config(
            config, use_karras_sigmas=True, final_sigmas_type="zero", solver_order=2
        )
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config.shift,
        use_dynamic_shifting=teacher.family.packed > 1,  # FLUX passes its shift
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_steps", [6, 20])
def test_dpm_solver_matches_the_stock_pipelines(
    name: str, num_steps: int, family_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For flows at the sigmas of the stock solver, which begins slightly below σ = 1."""
    if name not in ONE_EACH and num_steps == 20:
        pytest.skip("20 steps are tested for one member of each family")
    teacher = load(family_folder(name))
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    cond, uncond = teacher.encode(PROMPTS), teacher.unconditional().expand(2)
    guidance_scale = 0.0 if name == "flux_schnell" else 3.0

    # The stock pipeline
    pipeline = stock(family_folder(name))
    pipeline.scheduler = scheduler = stock_dpm_solver(teacher)
    expected = stock_call(
        pipeline, noise, num_inference_steps=num_steps, guidance_scale=guidance_scale
    )
    if teacher.family.flow:
        assert 0.98 < float(scheduler.sigmas[0]) < 1
        levels = [Level.flow(sigma) for sigma in scheduler.sigmas.tolist()]
        steps = []
        for timestep, pair in zip(scheduler.timesteps.tolist(), pairwise(levels), strict=True):
            steps.append(Step(timestep, *pair))
        monkeypatch.setattr(teacher, "steps", lambda num_steps, solver: steps)
    else:
        steps = teacher.steps(num_steps, "dpm++")
        assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
        assert steps[0].timestep == teacher.last_timestep

    # The same latents
    found = solve_ode(teacher, noise, cond, uncond, num_steps, guidance_scale, "dpm++")
    assert found.dtype == torch.float32 and found.isfinite().all()
    scale = max(1.0, float(expected.square().mean().sqrt()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)

    # The order of the solver has an effect
    first_order = solve_ode(teacher, noise, cond, uncond, num_steps, guidance_scale, "ddim")
    assert float((first_order - expected).abs().max()) > 1e-3 * scale


@pytest.mark.parametrize("name", FAMILIES)
def test_dpm_solver_starts_at_the_students_timestep(name: str, family_folder: Folder) -> None:
    """One step from pure noise is the network's x0 at the last timestep; more steps stay finite."""
    teacher = load(family_folder(name))
    noise, cond = noise_from_seeds([3], teacher.latent_shape), teacher.encode(PROMPTS[:1])
    x0 = teacher.denoise(noise, teacher.last_timestep, cond)
    found = solve_ode(teacher, noise, cond, cond, 1, 0.0, "dpm++")
    # With zero terminal SNR the solvers begin at α = 2^-12, as diffusers'
    tolerance = 1e-3 if name == "sd21_zero_snr" else 1e-5
    torch.testing.assert_close(found, x0, rtol=tolerance, atol=tolerance)
    assert solve_ode(teacher, noise, cond, cond, 5, 0.0, "dpm++").isfinite().all()


def test_unknown_solver_is_refused_with_the_nearest(family_folder: Folder) -> None:
    teacher = load(family_folder("sd15"))
    cond = teacher.encode(PROMPTS[:1])
    with pytest.raises(UserError, match=r"unknown solver 'dpm\+'; did you mean 'dpm\+\+'"):
        solve_ode(teacher, noise_from_seeds([1], teacher.latent_shape), cond, cond, 1, 0.0, "dpm+")


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux_dev", "sana"])
def test_guidance_changes_the_latents(name: str, family_folder: Folder) -> None:
    teacher = load(family_folder(name))
    noise, cond = noise_from_seeds([1], teacher.latent_shape), teacher.encode(PROMPTS[:1])
    weak = solve_ode(teacher, noise, cond, teacher.unconditional(), 3, 2.0)
    strong = solve_ode(teacher, noise, cond, teacher.unconditional(), 3, 6.0)
    assert float((weak - strong).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana"])
def test_negative_prompt_matches_the_stock_pipelines(name: str, family_folder: Folder) -> None:
    teacher = load(family_folder(name))
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    cond, uncond = teacher.encode(PROMPTS), teacher.unconditional("two stars").expand(2)

    options = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "negative_prompt": ["two stars"] * 2,
    }
    expected = stock_call(stock(family_folder(name)), noise, **options)
    found = solve_ode(teacher, noise, cond, uncond, 3, 3.0)
    scale = max(1.0, float(expected.square().mean().sqrt()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)

    # It has an effect
    without = solve_ode(teacher, noise, cond, teacher.unconditional().expand(2), 3, 3.0)
    assert float((without - expected).abs().max()) > 1e-4 * scale


@pytest.mark.parametrize("name", ONE_EACH)
def test_network_in_bfloat16_is_close_to_float32(name: str, family_folder: Folder) -> None:
    """x0 and the solver stay in float32, so that only the network's output is rounded."""
    teacher = load(family_folder(name))
    noise, cond = noise_from_seeds([1, 2], teacher.latent_shape), teacher.encode(PROMPTS)
    uncond = teacher.unconditional().expand(2)
    expected = solve_ode(teacher, noise, cond, uncond, 5, 2.0, "dpm++")

    teacher.set_precision("bfloat16")
    assert next(teacher.network.parameters()).dtype == torch.bfloat16
    found = solve_ode(teacher, noise, cond, uncond, 5, 2.0, "dpm++")
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_float16_is_refused_on_a_cpu(family_folder: Folder) -> None:
    teacher = load(family_folder("sd15"))
    with pytest.raises(UserError, match=r"float16 needs a GPU.*--precision float32"):
        teacher.set_precision("float16")
    assert teacher.precision == "float32"
    assert next(teacher.network.parameters()).dtype == torch.float32


def test_teacher_without_guidance_refuses_it(family_folder: Folder) -> None:
    teacher = load(family_folder("flux_schnell"))
    cond = teacher.encode(PROMPTS[:1])
    with pytest.raises(
        UserError, match=r"distilled without guidance.*guidance_scale = 3.*--guidance-scale 0"
    ):
        solve_ode(teacher, noise_from_seeds([1], teacher.latent_shape), cond, cond, 1, 3.0)


@pytest.mark.parametrize("name", ONE_EACH)
def test_decode_matches_the_stock_pipeline(name: str, family_folder: Folder) -> None:
    teacher, pipeline = load(family_folder(name)), stock(family_folder(name))
    size = RESOLUTION[name]
    noise = noise_from_seeds([1, 2], teacher.latent_shape)

    # Count the calls of the stock pipeline's decoder
    decoded: list[Tensor] = []
    decode = pipeline.vae.decode

    def counting_decode(latents: Tensor, **options: Any) -> Any:
        decoded.append(latents)
        return decode(latents, **options)

    pipeline.vae.decode = counting_decode

    # Images of the stock pipeline
    options = {"use_resolution_binning": False} if name == "sana" else {}
    latents = pipeline._pack_latents(noise, 2, 16, SIZE, SIZE) if name == "flux_dev" else noise
    expected = pipeline(
        PROMPTS,
        latents=latents,
        height=size,
        width=size,
        num_inference_steps=2,
        guidance_scale=0,
        output_type="pt",
        **options,
    ).images

    # Images of the teacher from the stock pipeline's latents
    latents = stock_call(pipeline, noise, num_inference_steps=2, guidance_scale=0)
    images = teacher.decode(latents)
    assert images.shape[-2:] == teacher.image_size == (size, size)
    torch.testing.assert_close((images + 1) / 2, expected, rtol=0, atol=1e-4)
    assert len(decoded) == 1


@pytest.mark.parametrize("name", ONE_EACH)
def test_conditionings_are_sliced_and_concatenated(name: str, family_folder: Folder) -> None:
    teacher = load(family_folder(name))
    both = teacher.encode(PROMPTS)
    joined = type(both).concat(both.rows(slice(0, 1)), both.rows(slice(1, 2)))
    assert len(joined) == 2
    assert joined.tensors().keys() == both.tensors().keys()
    for key, value in both.tensors().items():
        assert torch.equal(joined.tensors()[key], value), key

    expanded = teacher.unconditional().expand(3)
    assert all(len(value) == 3 for value in expanded.tensors().values())


def test_sdxl_uses_pooled_text_and_sizes(family_folder: Folder) -> None:
    folder = family_folder("sdxl")
    small = load_teacher(str(folder), resolution=64)
    large = load_teacher(str(folder), resolution=128)

    # Sizes in pixels follow the resolution
    cond = small.encode(PROMPTS)
    assert cond.time_ids is not None and cond.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert large.latent_shape == (4, 16, 16) and large.encode(PROMPTS[:1]).time_ids[0, 0] == 128

    # Both have an effect on the output
    noise = noise_from_seeds([1, 2], small.latent_shape)
    x0 = small.denoise(noise, 999, cond)
    for name in ("pooled_prompt_embeds", "time_ids"):
        changed = type(cond)(**{**cond.tensors(), name: cond.tensors()[name] * 2})
        assert float((small.denoise(noise, 999, changed) - x0).abs().max()) > 1e-4

    # force_zeros_for_empty_prompt
    assert float(small.unconditional().prompt_embeds.abs().max()) == 0


def test_packing_matches_flux(family_folder: Folder) -> None:
    pipeline = stock(family_folder("flux_schnell"))
    x = torch.arange(2 * 16 * 4 * 6.0).reshape(2, 16, 4, 6)
    assert torch.equal(pack(x), pipeline._pack_latents(x, 2, 16, 4, 6))
    assert torch.equal(unpack(pack(x), (4, 6)), x)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_ode_step_gives_the_networks_x0(name: str, family_folder: Folder) -> None:
    """For models whose steps start at the last timestep: not Stable Diffusion's leading spacing."""
    teacher = load(family_folder(name))
    if name in ("sd15", "sd21", "sdxl"):
        pytest.skip("its steps do not start at the last timestep")
    noise, cond = noise_from_seeds([3], teacher.latent_shape), teacher.encode(PROMPTS[:1])
    found = solve_ode(teacher, noise, cond, cond, 1, 0.0)
    torch.testing.assert_close(
        found, teacher.denoise(noise, teacher.last_timestep, cond), rtol=1e-5, atol=1e-5
    )


def test_resolution_that_does_not_fit_is_reported(family_folder: Folder) -> None:
    for name, unit in (("sd15", 8), ("flux_dev", 16), ("sd3", 16), ("sana", 32)):
        with pytest.raises(UserError, match=f"resolution {unit + 1}.*multiple of {unit} pixels"):
            load_teacher(str(family_folder(name)), resolution=unit + 1)


def copy_with_settings(folder: Path, to: Path, file: str, **settings: Any) -> Path:
    """Copies a pipeline and changes settings in one of its JSON files."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return to


def test_models_that_cannot_teach_are_refused(family_folder: Folder, tmp_path: Path) -> None:
    sd = family_folder("sd15")

    refiner = copy_with_settings(
        sd, tmp_path / "a", "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"
    )
    with pytest.raises(UserError, match="the SDXL refiner"):
        load_teacher(str(refiner))

    refiner = copy_with_settings(
        family_folder("sdxl"),
        tmp_path / "b",
        "model_index.json",
        text_encoder=[None, None],
        tokenizer=[None, None],
    )
    with pytest.raises(UserError, match="no text_encoder: it is the SDXL refiner"):
        load_teacher(str(refiner))

    zero_snr = copy_with_settings(
        sd, tmp_path / "c", "scheduler/scheduler_config.json", rescale_betas_zero_snr=True
    )
    with pytest.raises(UserError, match="ε with zero terminal SNR"):
        load_teacher(str(zero_snr))


@pytest.mark.parametrize(
    ("kind", "message"),
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
def test_other_pipelines_are_refused_with_a_remedy(kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match=message) as raised:
        load_teacher(str(tmp_path))
    assert "CONTRIBUTING.md" in str(raised.value)


def test_missing_third_text_encoder_is_reported(family_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(family_folder("sd3"), tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / "text_encoder_3")
    with pytest.raises(UserError, match="text_encoder_3") as raised:
        load_teacher(str(tmp_path / "sd3"))
    assert "[null, null]" in str(raised.value)


def test_inpainting_model_is_refused(tmp_path: Path) -> None:
    pipeline = sd15()
    pipeline.unet = unet(in_channels=9)
    pipeline.save_pretrained(tmp_path / "inpaint")
    with pytest.raises(UserError, match="takes 9 channels, but its VAE has 4: it is an inpainting"):
        load_teacher(str(tmp_path / "inpaint"))
