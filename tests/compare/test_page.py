"""The report in headless Chromium, from disk and offline.

The fixture `open_page` checks that the page requests nothing and logs no error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion2gan.compare import report
from diffusion2gan.compare.table import Column

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

Open = Callable[..., Any]
WAIT_MS = 120_000  # at most, on a busy machine
PROMPTS = ["a red ring", "a blue star", "a red star on <b>sand</b>", "كرة 🦊", "x" * 10_000]
MEASURED = {
    "teacher": {
        "frechet_distance": 1.0,
        "seconds_per_image": 1.2,
        "intervals": {"frechet_distance": [0.8, 1.3]},
    },
    "student": {"frechet_distance": 2.5, "seconds_per_image": 0.03, "attribute_accuracy": 0.7},
    "other": {},
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report of three systems; the third has no image of the second prompt."""
    folder = tmp_path_factory.mktemp("report")
    images: list[Image.Image | None] = []
    for i in range(len(PROMPTS)):
        images.append(Image.new("RGB", (64, 64), (40 * i, 90, 120)))
    columns = [
        Column("teacher", images, MEASURED["teacher"], "1 step"),
        Column("student", images, MEASURED["student"], "1 step"),
        Column("other", [images[0], None, *images[2:]], MEASURED["other"], "1 step"),
    ]
    report.write_report(folder, columns, PROMPTS, {"noise": "the same"})
    return (folder / "index.html").as_uri()


def test_the_table_and_charts_show_the_metrics(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)

    # The best value, and a bar per system, one of them with an interval
    assert page.inner_text("td.best >> nth=0").split("\n")[0] == "1 best"
    assert page.locator("#bars .track").count() == 2
    assert page.locator("#bars .track b").count() == 1

    # The teacher is slower (further right) and has a lower distance (further down)
    dots = page.locator("#scatter circle")
    assert dots.count() == 2
    teacher, student = dots.nth(0), dots.nth(1)
    for coordinate in ("cx", "cy"):
        assert float(teacher.get_attribute(coordinate)) > float(student.get_attribute(coordinate))

    # A metric that only the student has
    page.select_option("#metric", "attribute_accuracy")
    assert page.inner_text("#bars") == "student\n70 %"
    assert dots.count() == 1


def test_the_filter_keeps_prompts_with_all_words(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    rows = page.locator("#grid tbody tr:visible")
    assert rows.count() == len(PROMPTS)
    page.fill("#filter", "Star  red")
    assert rows.count() == 1
    assert page.inner_text("#count") == "1 of 5 prompts"
    page.fill("#filter", "no such words")
    assert rows.count() == 0
    assert page.is_visible("#none")


def test_systems_can_be_hidden_except_the_last(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    boxes = page.locator("#systems input")
    boxes.nth(0).click()
    assert page.locator("#grid tbody tr >> nth=0 >> td:visible").count() == 2

    # The third stays, although it is clicked too
    boxes.nth(1).click()
    boxes.nth(2).click()
    assert boxes.nth(2).is_checked()
    headings = page.locator("#grid thead th:visible").all_inner_texts()
    assert headings[1:] == ["other\n1 step"]


def test_an_image_opens_large_and_arrow_keys_move_to_its_neighbours(
    url: str, open_page: Open
) -> None:
    page = open_page(url, offline=True)
    page.locator(".shot").first.focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#large-name") == "teacher"
    assert "64 × 64 px" in page.inner_text("#large-size")

    # Left of the first system comes the last. It has no image of this prompt and is skipped.
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#large-name") == "student"
    assert page.inner_text("#large-prompt") == PROMPTS[1]

    # Closing returns the focus to the image that was shown
    page.keyboard.press("Escape")
    thumbnail = page.locator(".shot", has=page.get_by_alt_text(f"student: {PROMPTS[1]}"))
    sync_api.expect(thumbnail).to_be_focused(timeout=WAIT_MS)


def test_the_slider_compares_teacher_and_student(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    page.click("#slide")
    assert page.inner_text("#left-name") == "teacher"
    assert page.inner_text("#right-name") == "student"

    # Keys and clicks move the divider
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        page.keyboard.press(key)
    clip = page.evaluate("getComputedStyle(document.getElementById('other-image')).clipPath")
    assert clip == "inset(0px 0% 0px 0px)"
    frame = page.locator("#frame").bounding_box()
    page.mouse.click(frame["x"] + frame["width"] / 4, frame["y"] + 5)
    assert abs(float(page.input_value("#split")) - 25) <= 1

    # The third system has no image of the second prompt to compare with
    page.keyboard.press("ArrowDown")
    page.select_option("#against", "2")
    assert not page.is_visible("#left-name")
    page.keyboard.press("Escape")


def test_hovering_zooms_all_images_of_the_row(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    page.locator(".shot").first.hover()
    # The zoom is animated: wait until the second image of the row has twice its size
    zoomed = page.locator(".shot img").nth(1)
    sync_api.expect(zoomed).to_have_css("transform", "matrix(2, 0, 0, 2, 0, 0)", timeout=WAIT_MS)


def test_the_download_has_all_prompts_and_metrics(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    with page.expect_download() as download:
        page.click("#download")
    data = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert data["prompts"] == PROMPTS
    assert {system["name"]: system["metrics"] for system in data["systems"]} == MEASURED


def test_a_phone_shows_the_page_without_horizontal_scrolling(url: str, open_page: Open) -> None:
    page = open_page(
        url,
        offline=True,
        viewport={"width": 360, "height": 740},
        color_scheme="dark",
        has_touch=True,
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360

    # The dark colours are used
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert max(red, green, blue) < 40

    page.locator(".shot").first.tap()
    assert page.is_visible("#large-image")


@pytest.mark.slow
def test_two_hundred_prompts_of_six_systems_scroll_smoothly(
    tmp_path: Path, open_page: Open
) -> None:
    """Measured in CPU time of the page's thread, which does not depend on other processes."""
    rng = np.random.default_rng(0)
    images: list[Image.Image | None] = []
    for _ in range(200):
        images.append(Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)))
    columns = [
        Column(f"system {i}", images, {"clip_score": 0.1 * i, "seconds_per_image": 1.0 + i})
        for i in range(6)
    ]
    prompts = [f"prompt {i} of many" for i in range(200)]
    file = tmp_path / "index.html"
    file.write_text(report.render(columns, prompts, {}), encoding="utf-8")

    page = open_page(file.as_uri(), offline=True)
    page.set_default_timeout(WAIT_MS)
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def cpu_seconds() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    # Scroll through the page, one step per frame
    before = cpu_seconds()
    page.evaluate("""async () => {
      for (let i = 0; i < 60; i++) {
        scrollBy(0, 300);
        await new Promise(requestAnimationFrame);
      }
    }""")
    assert page.evaluate("scrollY") > 5000
    assert (cpu_seconds() - before) / 60 < 0.1  # seconds per frame

    page.fill("#filter", "prompt 19")
    assert page.inner_text("#count") == "12 of 200 prompts"  # 19, 119, 190 to 199


def test_labels_of_the_chart_do_not_collide(tmp_path: Path, open_page: Open) -> None:
    """Eight systems of nearly the same time and quality, some with long names."""
    images = [Image.new("RGB", (32, 32))]
    columns = []
    for i in range(8):
        metrics = {
            "clip_score": 0.8 + 0.0004 * (i % 3),
            "seconds_per_image": 0.02 + 0.0003 * i,
            "intervals": {"clip_score": [0.79, 0.81]},
        }
        columns.append(Column(f"student {i} with a name", images, metrics, "1 step"))
    columns.append(Column("teacher", images, {"clip_score": 0.82, "seconds_per_image": 1.0}))
    report.write_report(tmp_path, columns, ["p"], {})
    for width in (1280, 390):
        page = open_page(
            (tmp_path / "index.html").as_uri(), viewport={"width": width, "height": 800}
        )
        assert page.locator("#scatter circle").count() == 9
        texts = page.evaluate(
            """() => [...document.querySelectorAll("#scatter text:not(.faint)")]
                .map(node => node.getBoundingClientRect())
                .map(({left, right, top, bottom}) => ({left, right, top, bottom}))"""
        )
        assert len(texts) == 9
        texts_of_axes = page.evaluate(
            """() => [...document.querySelectorAll("#scatter text.faint")]
                .map(node => node.getBoundingClientRect())
                .map(({left, right, top, bottom}) => ({left, right, top, bottom}))"""
        )
        plot = page.locator("#scatter svg").bounding_box()
        for i, a in enumerate(texts):
            assert plot["x"] - 1 <= a["left"] and a["right"] <= plot["x"] + plot["width"] + 1
            for b in [*texts[:i], *texts_of_axes]:
                apart_x = a["right"] <= b["left"] or b["right"] <= a["left"]
                middle_distance = abs(a["top"] + a["bottom"] - b["top"] - b["bottom"]) / 2
                assert apart_x or middle_distance > 0.7 * (a["bottom"] - a["top"])


def test_numbers_fit_a_phone_without_scrolling_sideways(url: str, open_page: Open) -> None:
    page = open_page(url, viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator(".numbers").first
    assert box.evaluate("node => node.scrollWidth <= node.clientWidth")


def test_paper_has_every_image_inside_the_page_and_no_controls(url: str, open_page: Open) -> None:
    page = open_page(url, viewport={"width": 718, "height": 1000}, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    for name in ("#filter", "#slide", "#download", "#metric", "#systems"):
        assert not page.locator(name).is_visible(), name
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert (paper, ink) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
