"""The ODE solver against the stock pipeline's sampling loop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.ode import solve_ode

PROMPTS = ["a red ring on a blue ground", "two stars"]


def stock_latents(
    folder: Path, noise: torch.Tensor, steps: int, guidance_scale: float
) -> torch.Tensor:
    """Latents of the stock pipeline with DDIM."""
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images


@pytest.mark.parametrize("style", ["tiny_teacher", "sd_style_teacher"])
@pytest.mark.parametrize(("steps", "guidance_scale"), [(5, 3.0), (10, 1.0), (7, 3.0), (10, 3.0)])
def test_ode_matches_the_stock_pipelines_ddim(
    style: str, steps: int, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(style)
    teacher = load_teacher(str(folder))
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    cond, uncond = teacher.encode(PROMPTS), teacher.encode(["", ""])

    # The same latents
    expected = stock_latents(folder, noise, steps, guidance_scale)
    found = solve_ode(teacher, noise, cond, uncond, steps, guidance_scale)
    assert found.dtype == torch.float32 and not found.requires_grad
    scale = float(expected.square().mean().sqrt())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, scale))

    # The prompt has an effect, so the agreement is meaningful
    swapped_cond = teacher.encode(PROMPTS[::-1])
    swapped = solve_ode(teacher, noise, swapped_cond, uncond, steps, guidance_scale)
    assert float((swapped - expected).abs().max()) > 1e-3


def test_guidance_extrapolates_from_unconditional_to_conditional_x0(tiny_teacher: Path) -> None:
    """One step to ᾱ = 1 gives x0, which is affine in the guidance scale (checked in float64)."""
    teacher = load_teacher(str(tiny_teacher))
    noise = noise_from_seeds([5], teacher.latent_shape)
    cond, uncond = teacher.encode(PROMPTS[:1]), teacher.encode([""])
    x0_cond = teacher.denoise(noise, 999, cond).double()
    x0_uncond = teacher.denoise(noise, 999, uncond).double()

    for scale in (1.5, 3.0, 8.0):
        found = solve_ode(teacher, noise, cond, uncond, 1, scale)
        expected = x0_uncond + scale * (x0_cond - x0_uncond)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)

    # Scales up to 1 turn guidance off
    for scale in (0.0, 0.5, 1.0):
        found = solve_ode(teacher, noise, cond, uncond, 1, scale)
        torch.testing.assert_close(found.double(), x0_cond, rtol=0, atol=1e-6)


def test_ode_starts_and_ends_at_the_timesteps_of_the_scheduler_settings(
    tiny_teacher: Path, sd_style_teacher: Path
) -> None:
    # Pocket teacher: from the last timestep to clean latents
    steps = load_teacher(str(tiny_teacher)).steps(50)
    assert len(steps) == 50
    assert steps[0].timestep == 999 and steps[-1].target == (1.0, 0.0)
    for step, next_step in pairwise(steps):
        assert step.target == next_step.current

    # Stable Diffusion 1.5: leading spacing, and set_alpha_to_one=False
    teacher = load_teacher(str(sd_style_teacher))
    steps = teacher.steps(50)
    assert steps[0].timestep == 981 and steps[-1].timestep == 1
    assert float(steps[-1].target.alpha) == pytest.approx(teacher.alpha_bar(0) ** 0.5)


def test_conditionings_are_concatenated_in_order(tiny_teacher: Path) -> None:
    teacher = load_teacher(str(tiny_teacher))
    both = Conditioning.concat(teacher.encode(PROMPTS[:1]), teacher.encode(PROMPTS[1:]))
    assert len(both) == 2
    torch.testing.assert_close(
        both.prompt_embeds, teacher.encode(PROMPTS).prompt_embeds, rtol=0, atol=1e-4
    )
