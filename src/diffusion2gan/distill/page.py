"""The page of a run, `index.html`: self-contained, and refreshed while the run trains."""

from __future__ import annotations

import base64
import io
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffusion2gan.distill.curves import PANELS, Curves, draw_chart, healthy_curves
from diffusion2gan.distill.health import REMEDIES
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.samples import Sample
from diffusion2gan.pairs.store import PairsSpec
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.files import atomic_write
from diffusion2gan.runtime.progress import clock

PAGE = "index.html"
WRITE_EVERY_S = 60.0  # besides each time that samples are written
REFRESH_S = 30  # how often a browser loads the page again while the run trains
PACE_STEPS = 100  # steps over which the pace is measured
MAX_SIDE = 384  # pixels of a sample on the page


@dataclass(frozen=True)
class PageSample:
    """A sample as the page embeds it: data URIs, None for the teacher of a prompt of the user."""

    prompt: str
    student: str
    teacher: str | None


class RunPage:
    """What the page shows of a run. The main rank has one; it is written to `out/index.html`."""

    def __init__(self, run: Run, spec: PairsSpec, out: Path) -> None:
        self._run = run
        self._spec = spec
        self._out = out
        self._curves = Curves(run.recipe.total_pairs)
        self._seconds_per_pair: deque[float] = deque(maxlen=PACE_STEPS)
        self._warnings: list[tuple[int, str]] = []
        self._samples: list[PageSample] = []
        self._samples_pairs_seen = 0
        self._memory_bytes: int | None = None
        self._last_written = time.monotonic()

        # The lines of a run that is resumed; its pace is measured again
        log = out / "log.jsonl"
        if log.exists():
            with log.open(encoding="utf-8") as file:
                for line in file:
                    self.add(json.loads(line))
        self._seconds_per_pair.clear()

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line of log.jsonl."""
        self._curves.add(line)
        for warning in line.get("warnings", []):
            self._warnings.append((line["pairs_seen"], warning))
        if line.get("pairs_per_s"):
            self._seconds_per_pair.append(1 / line["pairs_per_s"])
        self._memory_bytes = line.get("peak_memory_bytes", self._memory_bytes)

    def set_samples(self, samples: Sequence[Sample]) -> None:
        """The samples that the page shows from now on."""
        self._samples_pairs_seen = self._run.pairs_seen
        self._samples = []
        for sample in samples:
            teacher = None if sample.teacher is None else data_uri(sample.teacher)
            self._samples.append(PageSample(sample.prompt, data_uri(sample.student), teacher))

    def write_if_due(self) -> None:
        if time.monotonic() - self._last_written >= WRITE_EVERY_S:
            self.write("training")

    def write(self, state: str) -> None:
        """Writes the page atomically. `state` is "training", "stopped" or "finished"."""
        self._last_written = time.monotonic()
        text = self._render(state)
        with atomic_write(self._out / PAGE) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")

    def _render(self, state: str) -> str:
        run = self._run
        environment = Environment(
            loader=PackageLoader("diffusion2gan.distill"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        active = run.health.active_warnings
        return environment.get_template("run.html.j2").render(
            name=self._out.resolve().name,
            state=state,
            refresh_s=REFRESH_S,
            pairs_seen=run.pairs_seen,
            total_pairs=run.recipe.total_pairs,
            facts=self._facts(state),
            active_warnings=[(warning, REMEDIES[warning]) for warning in active],
            warnings=self._warnings,
            charts=self._charts(),
            samples=self._samples,
            samples_pairs_seen=self._samples_pairs_seen,
            settings=describe_settings(run.recipe),
            pairs=vars(self._spec),
        )

    def _facts(self, state: str) -> dict[str, str]:
        """The figures at the top of the page."""
        run = self._run
        facts = {"pairs seen": f"{run.pairs_seen:,} of {run.recipe.total_pairs:,}"}
        if self._seconds_per_pair:
            pace = len(self._seconds_per_pair) / sum(self._seconds_per_pair)
            facts["pace"] = f"{pace:.3g} pairs/s"
            if state == "training":
                facts["ETA"] = clock((run.recipe.total_pairs - run.pairs_seen) / pace)
        if "loss" in run.health.average:
            facts["distance"] = f"{run.health.average['loss']:.4g}"
        if self._memory_bytes is not None:
            facts["peak memory"] = f"{self._memory_bytes / 2**30:.2f} GiB"
        facts["device"] = str(run.teacher.device)
        if run.group.ranks.world_size > 1:
            facts["ranks"] = str(run.group.ranks.world_size)
        facts["skipped updates"] = str(run.health.skipped)
        facts["written"] = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return facts

    def _charts(self) -> list[dict[str, Any]]:
        """The panels with a curve of this run: its chart, and the healthy run's."""
        healthy = healthy_curves()
        healthy_last = max(x for curve in healthy.values() for x, _ in curve)
        charts = []
        for panel in PANELS:
            keys = panel.keys.items()
            own = {name: self._curves.curve(key) for name, key in keys}
            chart = draw_chart(panel, own, self._run.recipe.total_pairs, f"{panel.title}: this run")
            if not chart:
                continue
            reference = {name: healthy.get(key, []) for name, key in keys}
            beside = draw_chart(panel, reference, healthy_last, f"{panel.title}: a healthy run")
            charts.append(
                {
                    "panel": panel,
                    "names": list(panel.keys),
                    "own": chart,
                    "healthy": beside,
                }
            )
        return charts


def describe_settings(recipe: Recipe) -> list[tuple[str, str, bool]]:
    """(name, value, whether it differs from the default) of every setting."""
    changed = recipe.changed(Recipe())
    return [(key, str(getattr(recipe, key)), key in changed) for key in Recipe.model_fields]


def data_uri(image: Image.Image) -> str:
    """An image as a data URI: WebP, its longer side at most MAX_SIDE pixels."""
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
