"""Our ODE against the stock pipeline's own loop, and the one door to diffusers."""

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
def test_the_ode_is_the_stock_pipelines_ddim(
    style: str, steps: int, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(style)
    teacher = load_teacher(str(folder))
    noise = noise_from_seeds([1, 2], teacher.latent_shape)
    expected = stock_latents(folder, noise, steps, guidance_scale)
    found = solve_ode(
        teacher, noise, teacher.encode(PROMPTS), teacher.encode(["", ""]), steps, guidance_scale
    )
    assert found.dtype == torch.float32 and not found.requires_grad
    scale = float(expected.square().mean().sqrt())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, scale))
    others = solve_ode(
        teacher,
        noise,
        teacher.encode(PROMPTS[::-1]),
        teacher.encode(["", ""]),
        steps,
        guidance_scale,
    )
    assert (
        float((others - expected).abs().max()) > 1e-3
    )  # the prompt matters, so the agreement means something


def test_guidance_moves_along_the_line_between_both_answers(tiny_teacher: Path) -> None:
    """One step to ᾱ = 1 gives x0, and x0 is affine in the guidance scale (float64 extrapolation)."""
    teacher = load_teacher(str(tiny_teacher))
    noise = noise_from_seeds([5], teacher.latent_shape)
    cond, uncond = teacher.encode(PROMPTS[:1]), teacher.encode([""])
    with_prompt, without = (teacher.denoise(noise, 999, c).double() for c in (cond, uncond))
    for scale in (1.5, 3.0, 8.0):
        found = solve_ode(teacher, noise, cond, uncond, 1, scale)
        torch.testing.assert_close(
            found.double(), without + scale * (with_prompt - without), rtol=0, atol=1e-4
        )
    for off in (0.0, 0.5, 1.0):
        torch.testing.assert_close(
            solve_ode(teacher, noise, cond, uncond, 1, off).double(), with_prompt, rtol=0, atol=1e-6
        )


def test_the_two_styles_start_and_end_where_their_schedulers_say(
    tiny_teacher: Path, sd_style_teacher: Path
) -> None:
    ours = load_teacher(str(tiny_teacher)).steps(50)
    assert len(ours) == 50 and ours[0][0] == 999 and ours[-1].there == (1.0, 0.0)
    theirs = load_teacher(str(sd_style_teacher))
    steps = theirs.steps(50)
    assert steps[0][0] == 981 and steps[-1][0] == 1
    assert float(steps[-1].there.alpha) == pytest.approx(
        theirs.alpha_bar(0) ** 0.5
    )  # set_alpha_to_one=False
    for (_, _, after), (_, before, _) in pairwise(ours):
        assert after == before


def test_conditionings_join_in_order(tiny_teacher: Path) -> None:
    teacher = load_teacher(str(tiny_teacher))
    both = Conditioning.concat(teacher.encode(PROMPTS[:1]), teacher.encode(PROMPTS[1:]))
    assert len(both) == 2
    torch.testing.assert_close(
        both.prompt_embeds, teacher.encode(PROMPTS).prompt_embeds, rtol=0, atol=1e-4
    )
