"""The scheduler of a one-step student, and how to recognise it."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from diffusion2gan.teacher.pipeline import Teacher

FLOW_SHIFT = 1e9  # a flow's shift: σ/(σ + (1−σ)/shift) is one in float32 at every σ that a scheduler asks for


def one_step_scheduler(teacher: Teacher) -> LCMScheduler | FlowMatchEulerDiscreteScheduler:
    """A stock scheduler whose one step is x0 at T, and which never runs another number of them wrongly.

    Diffusion: LCMScheduler with `original_inference_steps=1` starts at the last timestep and returns x0 (its boundary
    terms are 6e-8 there); any other number of steps raises. Flows: Euler with so large a shift that every step but the
    last stays at σ = 1, so any number of steps gives the same x0, or raises where diffusers counts equal timesteps.
    """
    config = teacher.scheduler.config
    if not teacher.family.flow:
        return LCMScheduler.from_config(config, original_inference_steps=1, clip_sample=False)
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=FLOW_SHIFT
    )


def is_one_step(scheduler: Any) -> bool:
    """Whether it is `export`'s: a student's, for exactly one step."""
    if isinstance(scheduler, LCMScheduler):
        return bool(scheduler.config.original_inference_steps == 1)
    return (
        isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        and scheduler.config.shift == FLOW_SHIFT
    )
