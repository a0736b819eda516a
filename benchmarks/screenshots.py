"""Pictures of the pages for the documents: `serve`, `serve --vote` and a report, in headless Chromium.

    python benchmarks/screenshots.py --report demo/index.html     # needs the extra [demo], playwright and a Chromium

Writes docs/images/serve.png, vote.png and, where a report is given (`make demo` makes one), report.png,
report_phone.png and report_slider.png, in at most 256 colours: look at them before you keep them. The times that the
served page shows are this machine's, as busy as it is.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from serve_latency import TOLD, WAIT_MS, chromium, served

OUT = Path(__file__).parents[1] / "docs" / "images"
PROMPTS = (
    "two small dotted blue stars on pink",
    "a large striped red ring left of a small blue star on sand",
)
PIXELS = 880  # a picture's largest width


def opened(browser: Browser, url: str, width: int, height: int, dark: bool = False) -> Page:
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    return page


def keep(page: Page, name: str, *, whole: bool = False) -> None:
    page.wait_for_timeout(1000)  # whatever fades in
    picture = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    picture.thumbnail((PIXELS, 10_000), Image.Resampling.LANCZOS)
    picture.quantize(256, dither=Image.Dither.NONE).save(OUT / name, optimize=True)
    print(f"{name}: {picture.width}×{picture.height}, {(OUT / name).stat().st_size / 1000:.0f} kB")


def of_serve(browser: Browser, folder: Path) -> None:
    with served(folder, "pocket-student", "--teacher", "pocket-teacher") as (url, _):
        page = opened(browser, url, 1100, 900)
        prompt = page.locator("#prompt textarea, #prompt input")
        for number, text in enumerate(PROMPTS, 1):
            prompt.fill(text)
            page.wait_for_function(TOLD, arg=text)
            prompt.press("Enter")
            page.wait_for_function(f"document.querySelectorAll('#kept img').length == {number}")
        page.click("#ask")
        page.wait_for_selector("#teacher img")
        page.wait_for_function("document.querySelectorAll('#kept img').length == 3")
        keep(page, "serve.png", whole=True)


def of_votes(browser: Browser, folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    with served(
        folder, "--vote", "pocket-student", "pocket-teacher", "--prompts", "prompts.txt"
    ) as (url, _):
        page = opened(browser, url, 1100, 760)
        page.wait_for_selector("#right img")
        page.locator("#realism").get_by_label("Right").check()
        keep(page, "vote.png", whole=True)


def of_report(browser: Browser, report: Path) -> None:
    url = report.resolve().as_uri()
    keep(opened(browser, url, 1100, 1500), "report.png")
    keep(opened(browser, url, 390, 1700, dark=True), "report_phone.png")
    page = opened(browser, url, 1100, 820)
    page.click("#slide")
    keep(page, "report_slider.png")


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
        browser = chromium(driver)
        if "serve" in args.only:
            of_serve(browser, Path(folder))
        if "vote" in args.only:
            of_votes(browser, Path(folder))
        if "report" in args.only and args.report:
            of_report(browser, args.report)


if __name__ == "__main__":
    main()
