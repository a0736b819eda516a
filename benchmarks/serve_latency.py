"""How long a picture takes to appear in `serve`, from the last letter typed, and pictures a second in `evaluate`.

    python benchmarks/serve_latency.py            # needs the extra [demo], playwright and an installed Chromium

The served page is opened in headless Chromium. For each of `--count` held-out captions all letters but the last are put
in, and when their picture is there the last letter is typed: the clock starts in the page at that key's event and stops
when the browser has decoded another picture. Of it, the pipeline's own part is what the page's note says. The first
picture of all is told apart: the server has just started. Then the student's pictures a second, as
`evaluate` takes them. Writes docs/results/serve_latency.json, with the machine's load before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import torch
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.pocket import scenes
from diffusion2gan.runtime.files import write_json

OUT = Path(__file__).parents[1] / "docs" / "results" / "serve_latency.json"
WORLD = 3000  # captions that nothing was trained or measured on
WAIT_MS = 300_000  # at most, on a machine that is busy with other things
TOLD = "text => document.querySelector('#student-note').innerText.trim().endsWith(text)"
# Remembers when a key arrived and when, after it, another picture was shown and decoded.
CLOCK = """() => {
  const now = { typed: 0, shown: 0, source: '' };
  window.clock = now;
  document.querySelector('#prompt').addEventListener('input', () => { now.typed = performance.now(); now.shown = 0; }, true);
  const look = async () => {
    const image = document.querySelector('#student img');
    if (image && image.src !== now.source) {
      now.source = image.src;
      await image.decode().catch(() => {});
      now.shown = performance.now();
    }
  };
  new MutationObserver(look).observe(document.querySelector('#student'), { subtree: true, childList: true, attributes: true });
}"""


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served(folder: Path, *argv: str) -> Iterator[tuple[str, float]]:
    """`diffusion2gan serve ARGV…` in `folder`: its address, and the seconds from the command to the page's being there.

    What it makes lies in `folder`.
    """
    command = [sys.executable, "-m", "diffusion2gan", "serve", *argv, "--port", "0"]
    log, start = folder / "serve.log", time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        while not (
            (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()))
            and listens(int(found[1]))
        ):
            if process.poll() is not None or time.perf_counter() - start > WAIT_MS / 1000:
                raise SystemExit(f"serve did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield found[0], time.perf_counter() - start
    finally:
        process.terminate()
        process.wait(60)


def chromium(driver: Playwright) -> Browser:
    """The installed one."""
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    return driver.chromium.launch(
        executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else []
    )


def one(page: Page, text: str) -> dict[str, float]:
    """Seconds from the last letter of `text` to its picture, and the pipeline's part of them."""
    prompt = page.locator("#prompt textarea, #prompt input")
    prompt.fill(text[:-1])
    page.wait_for_function(TOLD, arg=text[:-1])
    page.wait_for_function("window.clock.shown > 0")
    page.wait_for_timeout(100)  # nothing is under way any more
    prompt.press("End")
    prompt.press_sequentially(text[-1])
    page.wait_for_function(TOLD, arg=text)
    page.wait_for_function("window.clock.shown > 0")
    seconds = page.evaluate("(window.clock.shown - window.clock.typed) / 1000")
    told = re.match(r"([\d.]+) s", page.inner_text("#student-note"))
    assert told is not None
    return {"total_s": seconds, "pipeline_s": float(told[1])}


def in_the_browser(system: str, count: int, folder: Path) -> dict[str, Any]:
    captions = scenes.captions(range(count + 1), WORLD)
    with served(folder, system) as (url, start_s), sync_playwright() as driver:
        browser = chromium(driver)
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(url)
        page.locator("#prompt textarea, #prompt input").wait_for()
        page.evaluate(CLOCK)
        page.locator("#prompt textarea, #prompt input").fill(captions[0])
        page.wait_for_function("window.clock.shown > 0")
        first = page.evaluate("(window.clock.shown - window.clock.typed) / 1000")
        rows = [one(page, text) for text in captions[1:]]
        browser.close()
    total, own = (np.array([row[key] for row in rows]) for key in ("total_s", "pipeline_s"))
    return {
        "count": count,
        "command_to_page_s": start_s,
        "first_picture_s": first,
        "key_to_picture_median_s": float(np.median(total)),
        "key_to_picture_p90_s": float(np.quantile(total, 0.9)),
        "of_it_pipeline_median_s": float(np.median(own)),
        "of_it_pipeline_p90_s": float(np.quantile(own, 0.9)),
        "each_key_to_picture_s": [round(float(x), 4) for x in total],
    }


def by_evaluate(name: str) -> dict[str, float]:
    """`evaluate`'s own timings of a system: one picture alone, and 32 in one batch."""
    system, captions = load_system(name), scenes.captions(range(32), WORLD)
    return system.timings(captions, noise_from_seeds(range(32), system.latent_shape))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", default="pocket-student")
    parser.add_argument("--count", type=int, default=30, help="captions typed")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--note", default="", help="kept in the JSON: what else the machine was doing"
    )
    args = parser.parse_args()
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        found = in_the_browser(args.system, args.count, Path(folder))
    pace = by_evaluate(args.system)
    result = {
        "command": shlex.join(["python", "benchmarks/serve_latency.py", *sys.argv[1:]]),
        "system": args.system,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gradio": gradio.__version__,
        "load_before": list(before),
        "load_after": list(os.getloadavg()),
        "niceness": os.nice(0),
        "note": args.note,
        "serve": found,
        "evaluate": pace,
    }
    write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
