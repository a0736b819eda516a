"""The reports of a run: log.jsonl, warnings, and the failure after ten skipped steps in a row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from diffusion2gan.distill.checkpoints import CHECKPOINT
from diffusion2gan.distill.health import MAX_SKIPPED_IN_A_ROW
from diffusion2gan.distill.run import Run
from diffusion2gan.errors import Failure
from diffusion2gan.runtime.progress import console


def log_step(run: Run, entry: dict[str, Any], out: Path) -> None:
    """Appends a step's entry to log.jsonl and prints new warnings.

    Raises Failure at the tenth step in a row whose gradient was not finite.
    """
    # Health
    is_skipped = len(non_finite_gradients(entry)) > 0
    warnings = run.health.record(entry, is_skipped)

    # Log
    line = dict(entry)
    line["skipped"] = run.health.skipped
    line["skipped_share"] = run.health.average["skipped"]
    if warnings:
        line["warnings"] = warnings
    if run.group.ranks.is_main:
        with (out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(line)) + "\n")

    # Warnings and failure
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    if run.health.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise skipped_steps_failure(run, entry, out)


def non_finite_gradients(entry: dict[str, Any]) -> list[str]:
    """The networks whose gradients were not finite in this step, as possessives."""
    found = []
    if not math.isfinite(entry["grad_norm"]):
        found.append("the student's")
    if not math.isfinite(entry.get("d_grad_norm", 0.0)):
        found.append("the discriminator's")
    return found


def skipped_steps_failure(run: Run, entry: dict[str, Any], out: Path) -> Failure:
    """The error after too many skipped steps: whose gradient, where, and which setting to lower."""
    whose = non_finite_gradients(entry)
    if "the student's" in whose:
        settings = "learning_rate"
    else:
        settings = "discriminator_learning_rate or r1_weight"

    if (out / CHECKPOINT).exists():
        checkpoint_state = "The last checkpoint is intact"
    else:
        checkpoint_state = "No checkpoint was written yet"

    return Failure(
        f"{' and '.join(whose)} gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, "
        f"up to {entry['pairs_seen']} pairs (loss {entry['loss']}). {checkpoint_state}; lower "
        f"{settings} in a new run."
    )


def without_nan(value: Any) -> Any:
    """`value` with null instead of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
