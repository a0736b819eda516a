"""The page of a run, the log's new keys, and the trackers."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
from distill.run_logs import read_log
from PIL import Image

from diffusion2gan.distill import page, steps
from diffusion2gan.distill.curves import (
    NUM_SECTIONS,
    PANELS,
    Curves,
    Panel,
    compute_ticks,
    draw_chart,
    healthy_curves,
)
from diffusion2gan.distill.health import REMEDIES
from diffusion2gan.distill.reporting import MACHINE_KEYS, log_step
from diffusion2gan.distill.run import Run
from diffusion2gan.distill.steps import learning_rate
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import PairsSettings, build_spec, make_pairs
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.loading import load_teacher

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red star", "a <b>blue</b> moon", "a ring & a star"]
OWN_PROMPTS = ["an own prompt", "another <i>own</i> prompt"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pocket.save(tmp_path_factory.mktemp("page") / "teacher")


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page-pairs")
    loaded = load_teacher(str(teacher))
    spec = build_spec(loaded, PROMPTS, PairsSettings(count=6, num_inference_steps=2))
    make_pairs(loaded, PROMPTS, spec, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher: Path) -> Recipe:
    return Recipe(
        teacher=str(teacher),
        loss="mse",
        total_pairs=16,
        batch_size=2,
        discriminator="patch",
        patch_width=8,
        gan_start_pairs=4,
        discriminator_warmup=0,
        r1_every=2,
        sample_every=6,
    )


@pytest.fixture(scope="module")
def finished_run(recipe: Recipe, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page-runs") / "my-run"
    distill(recipe, pairs, out, sample_prompts=OWN_PROMPTS)
    return out


# ------------------------------------------------------------------------------------- The log


def test_log_has_time_learning_rates_pace_and_memory(finished_run: Path, recipe: Recipe) -> None:
    lines = read_log(finished_run)
    for before, line in enumerate(lines):
        pairs_before = before * recipe.batch_size
        assert line["learning_rate"] == learning_rate(recipe, pairs_before)
        assert ("d_learning_rate" in line) == (pairs_before >= recipe.gan_start_pairs)
        if "d_learning_rate" in line:
            ratio = recipe.discriminator_learning_rate / recipe.learning_rate
            assert line["d_learning_rate"] == pytest.approx(ratio * line["learning_rate"])
        assert 2**26 < line["peak_memory_bytes"] < 2**37
        assert all(key in line for key in MACHINE_KEYS)

    assert 0 <= time.time() - lines[-1]["time"] < 3600


def test_pace_is_the_batch_divided_by_the_seconds(recipe: Recipe, tmp_path: Path) -> None:
    run = Run(recipe, load_teacher(recipe.teacher))
    entry = {"pairs_seen": 2, "loss": 0.1, "grad_norm": 0.1}
    assert log_step(run, entry, tmp_path, seconds=0.5)["pairs_per_s"] == 4.0
    assert read_log(tmp_path)[0]["pairs_per_s"] == 4.0


# ------------------------------------------------------------------------------------ The page


def test_finished_page_has_everything_and_loads_nothing(finished_run: Path, recipe: Recipe) -> None:
    text = (finished_run / "index.html").read_text("utf-8")
    assert "<h1>my-run</h1>" in text
    assert '<div class="state">finished</div>' in text
    assert 'http-equiv="refresh"' not in text
    assert "16 of 16" in text and "pairs/s" in text and "GiB" in text
    assert "None at the moment." in text

    # Nothing from elsewhere; prompts are escaped
    assert not re.search(r"https?://|<script|<link|@import", text)
    assert "<b>blue</b>" not in text and "&lt;b&gt;blue&lt;/b&gt;" in text

    # This run's curves beside the healthy run's: every panel that has values here
    titles = [panel.title.replace("'", "&#39;") for panel in PANELS]
    assert [title for title in titles if f"<h3>{title}</h3>" not in text] == []
    assert text.count(': this run"') == len(PANELS)
    assert text.count(': a healthy run"') == 6  # all but learning rate and pace

    # Settings, with those that differ from the default marked
    assert f'<tr class="changed"><th scope="row">total_pairs</th><td>{recipe.total_pairs}<' in text
    assert '<tr><th scope="row">warmup</th><td>0.03<' in text
    assert "num_inference_steps</th><td>2<" in text


def test_samples_are_the_images_of_the_sheets_with_their_prompts(finished_run: Path) -> None:
    text = (finished_run / "index.html").read_text("utf-8")
    images = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]*)"', text)
    alts = [alt for _, alt in images]
    assert alts[:2] == ["student: an own prompt", "student: another &lt;i&gt;own&lt;/i&gt; prompt"]
    assert alts[2:4] == ["student: a red star", "teacher: a red star"]
    assert len(images) == 2 + 2 * 6
    assert "The averaged student after 16 pairs" in text

    # The first own sample is the first image of its sheet
    sheet = Image.open(finished_run / "samples" / "000000016-prompts.png").convert("RGB")
    side = Image.open(io.BytesIO(b64decode(images[0][0]))).width
    expected = page.data_uri(sheet.crop((0, 0, side, side)))
    assert expected == f"data:image/webp;base64,{images[0][0]}"
    assert sheet.size == (2 * side + 2, side)

    # Every sampling step has both sheets
    names = sorted(path.name for path in (finished_run / "samples").iterdir())
    steps = ("000000006", "000000012", "000000016")
    assert names == sorted(f"{step}{end}.png" for step in steps for end in ("", "-prompts"))


def test_page_is_refreshed_while_the_run_trains_and_then_shows_that_it_stopped(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    seen: list[str] = []
    real = steps.student_step

    def student_step(run: Run, *args: Any) -> Any:
        seen.append((out / "index.html").read_text("utf-8"))
        if run.pairs_seen == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, *args)

    monkeypatch.setattr(steps, "student_step", student_step)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, pairs, out)

    # Written at the start, and each time that samples are
    positions = [re.search(r"<dd>([\d,]+) of 16<", text).group(1) for text in seen]  # type: ignore[union-attr]
    assert positions == ["0", "0", "0", "6", "6", "6"]
    assert all('http-equiv="refresh"' in text for text in seen)
    assert "None yet" in seen[0] and "Nothing has been logged yet." in seen[0]
    assert "None yet" not in seen[3]
    stopped = (out / "index.html").read_text("utf-8")
    assert '<div class="state">stopped</div>' in stopped and "12 of 16" in stopped
    assert 'http-equiv="refresh"' not in stopped

    # Resumed, the page has the curves from the beginning
    monkeypatch.setattr(steps, "student_step", real)
    distill(recipe, pairs, out)
    text = (out / "index.html").read_text("utf-8")
    loss = re.search(r'aria-label="Distance to the teacher: this run">.*?points="([^"]*)"', text)
    assert loss is not None and len(loss.group(1).split()) == 8


def test_page_is_written_once_a_minute(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "WRITE_EVERY_S", 0.0)
    written: list[str] = []
    real = page.RunPage.write

    def write(self: page.RunPage, state: str) -> None:
        written.append(state)
        real(self, state)

    monkeypatch.setattr(page.RunPage, "write", write)
    distill(recipe, pairs, tmp_path / "run")
    # Start, 8 steps, 2 samples, the last samples, the end
    assert written == ["training"] * 12 + ["finished"]


def test_warnings_are_on_the_page(
    recipe: Recipe, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion2gan.distill.health.MIN_VALUES", 2)
    distill(recipe, pairs, tmp_path / "run")
    text = (tmp_path / "run" / "index.html").read_text("utf-8")
    logged = [line for line in read_log(tmp_path / "run") if "warnings" in line]
    assert logged, "this run gives no warning; choose another setting"
    name = logged[0]["warnings"][0].partition(":")[0]
    assert f"<b>{name}</b>" in text
    assert REMEDIES[name].replace("'", "&#39;") in text
    assert f"At {logged[0]['pairs_seen']} pairs: {name}" in text


def test_too_many_sample_prompts_are_refused(recipe: Recipe, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="65 sample prompts, but at most 64 are shown"):
        distill(recipe, pairs, tmp_path / "run", sample_prompts=["x"] * 65)


def test_page_in_a_browser_fits_a_phone(open_page: Any, finished_run: Path) -> None:
    for width in (390, 1280):
        shown = open_page(
            (finished_run / "index.html").as_uri(), viewport={"width": width, "height": 800}
        )
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        charts = shown.locator("figure svg")
        assert charts.count() == len(PANELS) + 6
        boxes = [charts.nth(i).bounding_box() for i in range(2)]
        # Beside each other on a desktop, below on a phone
        assert (boxes[0]["y"] == boxes[1]["y"]) == (width == 1280)


# ---------------------------------------------------------------------------------- The curves


def test_curve_is_the_mean_of_each_section() -> None:
    curves = Curves(total_pairs=4 * NUM_SECTIONS)
    for pairs_seen in range(1, 4 * NUM_SECTIONS + 1):
        curves.add({"pairs_seen": pairs_seen, "loss": float(pairs_seen), "r1": None, "skipped": 0})
    expected = [(2.5 + 4 * i, 2.5 + 4 * i) for i in range(NUM_SECTIONS)]
    assert list(curves.curve("loss")) == expected
    assert curves.curve("r1") == curves.curve("skipped") == []


def test_curves_of_a_long_run_stay_small() -> None:
    curves = Curves(total_pairs=10**6)
    for pairs_seen in range(100, 10**6 + 1, 100):
        curves.add({"pairs_seen": pairs_seen, "loss": 1.0})
    assert len(curves.curve("loss")) == NUM_SECTIONS


def test_points_are_where_their_values_are() -> None:
    panel = Panel("p", {"a": "a"}, low=0.0, high=10.0)
    chart = draw_chart(panel, {"a": [(0, 0.0), (50, 5.0), (100, 10.0)]}, 100, "label <x>")
    assert 'points="56.0,158.0 246.0,83.0 436.0,8.0"' in chart
    assert 'aria-label="label &lt;x&gt;"' in chart
    decades = Panel("p", {"a": "a"}, logarithmic=True)
    chart = draw_chart(decades, {"a": [(0, 1.0), (50, 0.0), (100, 100.0)]}, 100, "label")
    assert 'points="56.0,158.0 436.0,8.0"' in chart
    assert draw_chart(panel, {"a": []}, 100, "label") == ""


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "expected"),
    [
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.037, False, [0, 0.01, 0.02, 0.03]),
        (1.0, 1e4, True, [1, 10, 100, 1000, 10000]),
        (1e-3, 1e7, True, [1e-3, 1, 1e3, 1e6]),
    ],
)
def test_ticks_are_round(low: float, high: float, logarithmic: bool, expected: list[float]) -> None:
    panel = Panel("p", {}, logarithmic=logarithmic)
    assert compute_ticks(panel, low, high) == pytest.approx(expected)


def test_healthy_curves_are_those_of_the_figure() -> None:
    """The points of the page are drawn in the documentation's figure, to a tenth of a pixel."""
    figure = (ROOT / "docs" / "images" / "reference_curves.svg").read_text()
    drawn = [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'points="([^"]*)"', figure)
    ]
    healthy = healthy_curves()
    assert len(drawn) == len(healthy) == 11
    for (key, curve), points in zip(healthy.items(), drawn, strict=True):
        assert len(curve) == len(points), key
        for (pairs_seen, value), (x, y) in zip(curve, points, strict=True):
            assert 48 + 420 * pairs_seen / 96_000 == pytest.approx(x, abs=0.06), key
            if key == "loss":
                assert 220 * (1 - value / 4) == pytest.approx(y, abs=0.1)
            if key.startswith("accuracy"):
                assert 220 * (1 - value) == pytest.approx(y, abs=0.1)


def test_log_is_valid_json_lines(finished_run: Path) -> None:
    lines = (finished_run / "log.jsonl").read_text().splitlines()
    assert lines
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
