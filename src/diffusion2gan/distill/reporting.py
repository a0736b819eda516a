"""The reports of a run: log.jsonl, warnings, its page, trackers.

Also the failure after ten skipped steps in a row.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from diffusion2gan.distill.checkpoints import CHECKPOINT
from diffusion2gan.distill.health import MAX_SKIPPED_IN_A_ROW
from diffusion2gan.distill.metrics import StepMetrics
from diffusion2gan.distill.page import RunPage
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.samples import Sample
from diffusion2gan.distill.steps import learning_rate
from diffusion2gan.distill.trackers import Tracker, numbers_of_line, start_trackers
from diffusion2gan.errors import Diffusion2GANError, Failure
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.runtime.progress import console

# Keys of log.jsonl that depend on the machine: a resumed run repeats all others bit for bit.
MACHINE_KEYS = ("time", "pairs_per_s", "peak_memory_bytes")


class Reports:
    """All reports of a run: `with Reports(…) as reports: reports.add(metrics)`.

    All ranks have one; the main rank writes. At the end the page shows whether the run is finished.
    On a GPU the numbers of a step are read a step later, so that the host does not wait for them.
    """

    def __init__(self, run: Run, spec: PairsSpec, out: Path, trackers: Sequence[str]) -> None:
        self._run = run
        self._out = out
        self._page: RunPage | None = None
        self._trackers: list[Tracker] = []
        # Steps that are not reported yet, with their seconds
        self._waiting: deque[tuple[StepMetrics, float]] = deque()
        self._lag = 1 if run.teacher.device.type == "cuda" else 0
        if run.group.ranks.is_main:
            self._page = RunPage(run, spec, out)
            settings = run.recipe.model_dump()
            self._trackers = start_trackers(trackers, out, settings, run.pairs_seen)

    def __enter__(self) -> Reports:
        self._last_step = time.perf_counter()
        if self._page is not None:
            self._page.write("training")
        return self

    def add(self, metrics: StepMetrics) -> None:
        """Reports a step, on a GPU the step before. Raises Failure as `log_step` does."""
        now = time.perf_counter()
        self._waiting.append((metrics, now - self._last_step))
        self._last_step = now
        self._log(self._lag)

    def log_all(self) -> None:
        """Reports the steps that are not reported yet. Raises Failure as `log_step` does."""
        self._log(0)

    def _log(self, lag: int) -> None:
        while len(self._waiting) > lag:
            metrics, seconds = self._waiting.popleft()
            line = log_step(self._run, metrics.read(), self._out, seconds)

            # Page and trackers
            if self._page is not None:
                self._page.add(line)
                self._page.write_if_due()
            for tracker in self._trackers:
                tracker.log(numbers_of_line(line), line["pairs_seen"])

    def show_samples(self, samples: Sequence[Sample]) -> None:
        if self._page is not None:
            self._page.set_samples(samples)
            self._page.write("training")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for tracker in self._trackers:
            tracker.close()
        if self._page is None:
            return
        if error is None:
            self._page.write("finished")
            return

        # A page that cannot be written must not hide why the run ends
        with contextlib.suppress(OSError, Diffusion2GANError):
            self._page.write("stopped")


def log_step(run: Run, entry: dict[str, Any], out: Path, seconds: float) -> dict[str, Any]:
    """Appends a step's entry to log.jsonl and prints new warnings; returns the line.

    `seconds`: from the step before to this one, with whatever was written in between. Raises
    Failure at the tenth step in a row whose gradient was not finite.
    """
    # Health
    is_skipped = len(non_finite_gradients(entry)) > 0
    warnings = run.health.record(entry, is_skipped)

    # Log
    line = dict(entry)
    line["skipped"] = run.health.skipped
    line["skipped_share"] = run.health.average["skipped"]
    line.update(learning_rates(run, entry))
    line["time"] = round(time.time(), 3)
    line["pairs_per_s"] = round(run.recipe.batch_size / max(seconds, 1e-9), 4)
    line["peak_memory_bytes"] = peak_memory_bytes(run.teacher.device)
    if warnings:
        line["warnings"] = warnings
    line = without_nan(line)
    if run.group.ranks.is_main:
        with (out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # Warnings and failure
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    if run.health.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise skipped_steps_failure(run, entry, out)
    return line


def learning_rates(run: Run, entry: dict[str, Any]) -> dict[str, float]:
    """The learning rates of the networks that the step of this entry updated."""
    recipe = run.recipe
    rate = learning_rate(recipe, entry["pairs_seen"] - recipe.batch_size)
    rates = {"learning_rate": rate}
    if "d_loss" in entry:
        d_rate = rate * recipe.discriminator_learning_rate / recipe.learning_rate
        rates["d_learning_rate"] = d_rate
    return rates


def peak_memory_bytes(device: torch.device) -> int:
    """The peak since the start: of torch's tensors on a GPU, of the process on other devices."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


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
