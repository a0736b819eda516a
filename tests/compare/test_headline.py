"""The headline of a report, and the marks on times of a loaded machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion2gan.compare import report
from diffusion2gan.compare.headline import (
    compute_headlines,
    describe_load,
    describe_machines,
    format_speedup,
    load_note,
)
from diffusion2gan.compare.table import Column

TEACHER = {
    "seconds_per_image": 1.2,
    "clip_score": 0.8,
    "frechet_distance": 1.0,
    "intervals": {"frechet_distance": [0.9, 1.1]},
}
STUDENT = {
    "seconds_per_image": 0.03,
    "clip_score": 0.78,
    "frechet_distance": 1.2,
    "intervals": {"frechet_distance": [1.05, 1.3]},
}


def column(name: str, note: str = "1 step", **metrics: Any) -> Column:
    return Column(name, [Image.new("RGB", (8, 8))], metrics, note)


def test_headline_is_the_ratio_of_the_times_and_of_the_scores() -> None:
    columns = [column("teacher", "50 steps", **TEACHER), column("student", **STUDENT)]
    (headline,) = compute_headlines(columns)
    assert headline.speedup == pytest.approx(40)
    assert headline.title == "40× faster than teacher, 97.5 % of its CLIP score"
    assert headline.details == (
        "student (1 step, 0.03 s per image) against teacher (50 steps, 1.2 s per image); "
        "Fréchet distance 1.2 against 1, intervals overlap"
    )


def test_intervals_apart_are_said_to_be() -> None:
    student = STUDENT | {"intervals": {"frechet_distance": [1.15, 1.3]}}
    (headline,) = compute_headlines([column("teacher", **TEACHER), column("student", **student)])
    assert headline.distance.endswith("intervals apart")


def test_reference_is_the_slowest_teacher_and_students_come_first() -> None:
    columns = [
        column("other", seconds_per_image=5.0),
        column("teacher_one_step", **TEACHER | {"seconds_per_image": 0.04}),
        column("worse student", **STUDENT | {"frechet_distance": 2.0}),
        column("student", **STUDENT),
        column("teacher", "50 steps", **TEACHER),
        column("not measured"),
    ]
    headlines = compute_headlines(columns)
    names = [headline.system.name for headline in headlines]
    assert names == ["student", "worse student", "teacher_one_step"]
    assert {headline.reference.name for headline in headlines} == {"teacher"}


@pytest.mark.parametrize("seconds", [None, 0.0, float("nan"), float("inf"), True, "1"])
def test_without_times_there_is_no_headline(seconds: Any) -> None:
    columns = [
        column("teacher", seconds_per_image=seconds),
        column("student", seconds_per_image=seconds),
    ]
    assert compute_headlines(columns) == []


def test_a_slower_system_has_no_headline() -> None:
    assert (
        compute_headlines(
            [column("teacher", seconds_per_image=1.0), column("student", seconds_per_image=1.5)]
        )
        == []
    )


def test_speedups_have_two_digits() -> None:
    speedups = [format_speedup(x) for x in (1.06, 3.25, 9.94, 9.96, 31.6, 512.0)]
    assert speedups == ["1.1×", "3.2×", "9.9×", "10×", "32×", "512×"]


def test_times_of_a_loaded_machine_are_marked(tmp_path: Path) -> None:
    idle = column("teacher", **TEACHER, other_load=0.04, machine="A", measured_at="2026-01-02")
    loaded = column("student", **STUDENT, other_load=0.43, machine="A", measured_at="2026-01-03")
    assert (describe_load(idle), describe_load(loaded)) == ("", "loaded: 43 %")
    assert describe_load(column("x")) == ""
    assert load_note([idle]) == ""

    report.write_report(tmp_path, [idle, loaded], ["p"], {"written": "2026-01-04, by us"})
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "<h1>40× faster than teacher, 97.5 % of its CLIP score</h1>" in page
    assert page.count('<span class="tag warn">loaded: 43 %</span>') == 1
    assert "student (43 %). Measure them again on an idle machine" in page
    assert "Timed on A, 2026-01-02 to 2026-01-03" in page
    assert page.count("2026-01-04, by us") == 2  # the head, and the JSON for download
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "student: 40× faster than teacher" in text and "student (43 %)" in text
    assert "- times: A, 2026-01-02 to 2026-01-03" in text


def test_machines_are_listed_with_their_systems() -> None:
    columns = [column("a", machine="A"), column("b", machine="B", measured_at="x"), column("c")]
    assert describe_machines(columns) == ["a: A", "b: B, x"]
