"""The report in headless Chromium: from disk, network off; the fixture sees that its console holds no error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion2gan.compare import report
from diffusion2gan.compare.table import Column

Open = Callable[..., Any]
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
    folder = tmp_path_factory.mktemp("report")
    shades: list[Image.Image | None] = [
        Image.new("RGB", (64, 64), (40 * i, 90, 120)) for i in range(len(PROMPTS))
    ]
    gap = [shades[0], None, *shades[2:]]
    columns = [
        Column(name, gap if name == "other" else shades, m, "1 step")
        for name, m in MEASURED.items()
    ]
    report.write_report(folder, columns, PROMPTS, {"noise": "the same"})
    return (folder / "index.html").as_uri()


def test_the_numbers_and_charts_are_drawn(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    assert page.inner_text("td.best >> nth=0").split("\n")[0] == "1 best"
    assert page.locator("#bars .track").count() == 2 and page.locator("#bars .track b").count() == 1
    dots = page.locator("#scatter circle")
    across = [float(dots.nth(i).get_attribute("cx")) for i in range(2)]
    down = [float(dots.nth(i).get_attribute("cy")) for i in range(2)]
    assert (
        dots.count() == 2 and across[0] > across[1] and down[0] > down[1]
    )  # the teacher: slower, of lower distance
    page.select_option("#metric", "attribute_accuracy")
    assert page.inner_text("#bars") == "student\n70 %" and dots.count() == 1


def test_the_filter_keeps_the_prompts_with_every_word(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    rows = page.locator("#grid tbody tr:visible")
    assert rows.count() == len(PROMPTS)
    page.fill("#filter", "Star  red")
    assert rows.count() == 1 and page.inner_text("#count") == "1 of 5 prompts"
    page.fill("#filter", "nothing of it")
    assert rows.count() == 0 and page.is_visible("#none")


def test_systems_are_hidden_and_one_stays(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    boxes = page.locator("#systems input")
    boxes.nth(0).click()
    assert page.locator("#grid tbody tr >> nth=0 >> td:visible").count() == 2
    boxes.nth(1).click()
    boxes.nth(2).click()
    assert boxes.nth(2).is_checked() and page.locator("#grid thead th:visible").all_inner_texts()[
        1:
    ] == ["other\n1 step"]


def test_a_picture_opens_large_and_the_keyboard_walks(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    page.locator(".shot").first.focus()
    page.keyboard.press("Enter")
    name = page.locator("#large-name")
    assert name.inner_text() == "teacher" and "64 × 64 px" in page.inner_text("#large-size")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")  # past the gap: the third system has no second picture
    assert name.inner_text() == "student" and page.inner_text("#large-prompt") == PROMPTS[1]
    page.keyboard.press("Escape")
    closed = f"document.activeElement.firstElementChild?.alt === 'student: {PROMPTS[1]}'"  # the focus follows the event
    page.wait_for_function(closed, timeout=20_000)


def test_the_slider_shows_teacher_and_student(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    page.click("#slide")
    assert (page.inner_text("#left-name"), page.inner_text("#right-name")) == ("teacher", "student")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        page.keyboard.press(key)
        clip = page.evaluate("getComputedStyle(document.getElementById('other-image')).clipPath")
    assert clip == "inset(0px 0% 0px 0px)"
    frame = page.locator("#frame").bounding_box()
    page.mouse.click(frame["x"] + frame["width"] / 4, frame["y"] + 5)
    assert abs(float(page.input_value("#split")) - 25) <= 1
    page.keyboard.press("ArrowDown")
    page.select_option("#against", "2")
    assert not page.is_visible("#left-name")  # no picture of the third system there
    page.keyboard.press("Escape")


def test_hovering_zooms_the_row(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    page.locator(".shot").first.hover()
    page.wait_for_timeout(600)
    zoomed = page.evaluate("getComputedStyle(document.querySelectorAll('.shot img')[1]).transform")
    assert zoomed == "matrix(2, 0, 0, 2, 0, 0)"


def test_the_download_is_the_json(url: str, open_page: Open) -> None:
    page = open_page(url, offline=True)
    with page.expect_download() as download:
        page.click("#download")
    data = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert (
        data["prompts"] == PROMPTS
        and {s["name"]: s["metrics"] for s in data["systems"]} == MEASURED
    )


def test_a_phone_sees_all_of_it(url: str, open_page: Open) -> None:
    page = open_page(
        url,
        offline=True,
        viewport={"width": 360, "height": 740},
        color_scheme="dark",
        has_touch=True,
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert max(red, green, blue) < 40
    page.locator(".shot").first.tap()
    assert page.is_visible("#large-image")


@pytest.mark.slow
def test_two_hundred_prompts_of_six_systems_stay_smooth(tmp_path: Path, open_page: Open) -> None:
    shades: list[Image.Image | None] = [
        Image.effect_noise((64, 64), i % 90).convert("RGB") for i in range(200)
    ]
    columns = [
        Column(f"system {i}", shades, {"clip_score": 0.1 * i, "seconds_per_image": 1.0 + i})
        for i in range(6)
    ]
    page_file = tmp_path / "index.html"
    page_file.write_text(
        report.render(columns, [f"prompt {i} of many" for i in range(200)], {}), encoding="utf-8"
    )
    start = time.perf_counter()
    page = open_page(page_file.as_uri(), offline=True)
    assert (
        time.perf_counter() - start < 60
    )  # seconds, on a busy machine; half of one on an idle one
    frames = page.evaluate("""async () => {
      const gaps = [];
      for (let i = 0, last = performance.now(); i < 60; i++) {
        scrollBy(0, 300);
        const now = await new Promise(requestAnimationFrame);
        gaps.push(now - last);
        last = now;
      }
      return gaps.sort((a, b) => a - b);
    }""")
    assert (
        page.evaluate("scrollY") > 5000 and frames[30] < 250
    )  # milliseconds; 17 on an idle machine
    page.fill("#filter", "prompt 19")
    assert page.inner_text("#count") == "12 of 200 prompts"  # 19, 119, 190 to 199
