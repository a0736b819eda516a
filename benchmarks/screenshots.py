"""Screenshots for the documents: `serve`, `serve --vote` and a report, in headless Chromium.

    python benchmarks/screenshots.py --report demo/index.html

Needs the extra [demo], playwright and an installed Chromium. Writes docs/images/serve.png, vote.png
and, if a report is given (`make demo` writes one), report.png, report_phone.png and
report_slider.png, with at most 256 colours: check them before you commit them. The times on the
served page are those of this machine under its present load.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from serve_latency import NOTE_ENDS_WITH, WAIT_MS, launch_chromium, run_server

OUT = Path(__file__).parents[1] / "docs" / "images"
PROMPTS = (
    "two small dotted blue stars on pink",
    "a large striped red ring left of a small blue star on sand",
)
MAX_WIDTH = 880  # of a screenshot, in pixels


def open_page(browser: Browser, url: str, width: int, height: int, dark: bool = False) -> Page:
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    return page


def save_screenshot(page: Page, name: str, *, full_page: bool = False) -> None:
    page.wait_for_timeout(1000)  # for fade-ins
    image = Image.open(io.BytesIO(page.screenshot(full_page=full_page))).convert("RGB")
    image.thumbnail((MAX_WIDTH, 10_000), Image.Resampling.LANCZOS)
    image.quantize(256, dither=Image.Dither.NONE).save(OUT / name, optimize=True)
    size_kb = (OUT / name).stat().st_size / 1000
    print(f"{name}: {image.width}×{image.height}, {size_kb:.0f} kB")


def capture_serve(browser: Browser, folder: Path) -> None:
    with run_server(folder, "pocket-student", "--teacher", "pocket-teacher") as (url, _):
        page = open_page(browser, url, 1100, 900)
        prompt = page.locator("#prompt textarea, #prompt input")
        for number, text in enumerate(PROMPTS, 1):
            prompt.fill(text)
            page.wait_for_function(NOTE_ENDS_WITH, arg=text)
            prompt.press("Enter")
            page.wait_for_function(f"document.querySelectorAll('#kept img').length == {number}")
        page.click("#ask")
        page.wait_for_selector("#teacher img")
        page.wait_for_function("document.querySelectorAll('#kept img').length == 3")
        save_screenshot(page, "serve.png", full_page=True)


def capture_votes(browser: Browser, folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with run_server(
        folder, "--vote", "pocket-student", "pocket-teacher", "--prompts", "prompts.txt"
    ) as (url, _):
        page = open_page(browser, url, 1100, 760)
        page.wait_for_selector("#right img")
        page.locator("#realism").get_by_label("Right").check()
        save_screenshot(page, "vote.png", full_page=True)


def capture_report(browser: Browser, report: Path) -> None:
    url = report.resolve().as_uri()
    save_screenshot(open_page(browser, url, 1100, 1500), "report.png")
    save_screenshot(open_page(browser, url, 390, 1700, dark=True), "report_phone.png")
    page = open_page(browser, url, 1100, 820)
    page.click("#slide")
    save_screenshot(page, "report_slider.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, help="an index.html that compare or demo wrote")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("serve", "vote", "report"),
        default=["serve", "vote", "report"],
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = launch_chromium(driver)
        if "serve" in args.only:
            capture_serve(browser, Path(folder))
        if "vote" in args.only:
            capture_votes(browser, Path(folder))
        if "report" in args.only and args.report:
            capture_report(browser, args.report)


if __name__ == "__main__":
    main()
