"""The scheduler of a one-step student."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from diffusion2gan.teacher.pipeline import Teacher

# A flow scheduler maps σ to σ/(σ + (1−σ)/shift). With this shift the result is 1 in float32 at
# every σ that a scheduler uses.
FLOW_SHIFT = 1e9

# The settings of a diffusion scheduler that the network was trained with; all others belong to a
# sampler
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)

# Schedulers that give a diffusion student's image in one step, within a grey level; tested
COMPATIBLE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def one_step_scheduler(teacher: Teacher) -> LCMScheduler | FlowMatchEulerDiscreteScheduler:
    """A stock diffusers scheduler that returns the network's x0 at T after one step.

    Another scheduler that is made from its config in stock diffusers gives the same image in one
    step, if it is one of COMPATIBLE: the config has the noise schedule alone, starts at the last
    timestep ("trailing") and ends at clean latents.

    It never gives a wrong result with more steps. Diffusion models: LCMScheduler with
    `original_inference_steps=1` starts at the last timestep and returns x0 (its boundary terms
    are 6e-8 there); any other number of steps raises an error. Flow models: Euler with so large a
    shift that every step but the last stays at σ = 1, so any number of steps gives the same x0, or
    raises an error where diffusers rejects equal timesteps.
    """
    config = teacher.scheduler.config
    if teacher.family.flow:
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config.num_train_timesteps, shift=FLOW_SHIFT
        )
    schedule = {key: config[key] for key in NOISE_SCHEDULE if key in config}
    return LCMScheduler(
        **schedule,
        original_inference_steps=1,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def is_one_step(scheduler: Any) -> bool:
    """Whether a scheduler was made by `one_step_scheduler`, so the pipeline is a student."""
    if isinstance(scheduler, LCMScheduler):
        return bool(scheduler.config.original_inference_steps == 1)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return bool(scheduler.config.shift == FLOW_SHIFT)
    return False
