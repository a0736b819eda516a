"""Latency of `serve`: from the last letter typed to the image; and images per second in `evaluate`.

    python benchmarks/serve_latency.py

Needs the extra [demo], playwright and an installed Chromium, in which the served page is opened.
For each of `--count` held-out captions, all letters but the last are filled in. When their image is
shown, the last letter is typed: the clock starts in the page at that key's event and stops when the
browser has decoded another image. The share of the pipeline is read from the page's note. The first
image is reported separately, because the server has just started.

Then the student's images per second are measured as `evaluate` does it. Writes
docs/results/serve_latency.json, with the machine's load before and after.
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
WORLD = 3000  # captions that were not used for training or evaluation
WAIT_MS = 300_000  # longest wait, for a busy machine
PROMPT_BOX = "#prompt textarea, #prompt input"

# JavaScript: whether the student's note is about the given text
NOTE_ENDS_WITH = "text => document.querySelector('#student-note').innerText.trim().endsWith(text)"
# JavaScript: records when a key arrived, and when the next image was shown and decoded
CLOCK = """() => {
  const clock = { typed: 0, shown: 0, source: '' };
  window.clock = clock;

  const onInput = () => {
    clock.typed = performance.now();
    clock.shown = 0;
  };
  document.querySelector('#prompt').addEventListener('input', onInput, true);

  const onChange = async () => {
    const image = document.querySelector('#student img');
    if (image && image.src !== clock.source) {
      clock.source = image.src;
      await image.decode().catch(() => {});
      clock.shown = performance.now();
    }
  };
  const changes = { subtree: true, childList: true, attributes: true };
  new MutationObserver(onChange).observe(document.querySelector('#student'), changes);
}"""
IMAGE_SHOWN = "window.clock.shown > 0"
LATENCY_S = "(window.clock.shown - window.clock.typed) / 1000"


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def run_server(folder: Path, *argv: str) -> Iterator[tuple[str, float]]:
    """Runs `diffusion2gan serve ARGV…` in `folder`, where it writes its files.

    Yields the page's address and the seconds from the command until the page could be reached.
    """
    command = [sys.executable, "-m", "diffusion2gan", "serve", *argv, "--port", "0"]
    log = folder / "serve.log"
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        while True:
            address = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
            if address and is_listening(int(address[1])):
                break
            if process.poll() is not None or time.perf_counter() - start > WAIT_MS / 1000:
                raise SystemExit(f"serve did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield address[0], time.perf_counter() - start
    finally:
        process.terminate()
        process.wait(60)


def launch_chromium(driver: Playwright) -> Browser:
    """Launches the installed Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome")
    paths = [path for name in names if (path := shutil.which(name))]
    return driver.chromium.launch(
        executable_path=paths[0] if paths else None,
        args=["--no-sandbox"] if os.geteuid() == 0 else [],
    )


def type_last_letter(page: Page, text: str) -> dict[str, float]:
    """Seconds from the last letter of `text` to its image, and the pipeline's share of them."""
    # All letters but the last, and their image
    prompt = page.locator(PROMPT_BOX)
    prompt.fill(text[:-1])
    page.wait_for_function(NOTE_ENDS_WITH, arg=text[:-1])
    page.wait_for_function(IMAGE_SHOWN)
    page.wait_for_timeout(100)  # so that nothing else is running

    # The last letter
    prompt.press("End")
    prompt.press_sequentially(text[-1])
    page.wait_for_function(NOTE_ENDS_WITH, arg=text)
    page.wait_for_function(IMAGE_SHOWN)

    note = re.match(r"([\d.]+) s", page.inner_text("#student-note"))
    assert note is not None
    return {"total_s": page.evaluate(LATENCY_S), "pipeline_s": float(note[1])}


def measure_in_browser(system: str, count: int, folder: Path) -> dict[str, Any]:
    captions = scenes.captions(range(count + 1), WORLD)
    with run_server(folder, system) as (url, start_s), sync_playwright() as driver:
        browser = launch_chromium(driver)
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(url)

        # The first image, then one measurement per caption
        page.locator(PROMPT_BOX).wait_for()
        page.evaluate(CLOCK)
        page.locator(PROMPT_BOX).fill(captions[0])
        page.wait_for_function(IMAGE_SHOWN)
        first_s = page.evaluate(LATENCY_S)
        rows = [type_last_letter(page, text) for text in captions[1:]]
        browser.close()

    total_s = np.array([row["total_s"] for row in rows])
    pipeline_s = np.array([row["pipeline_s"] for row in rows])
    return {
        "count": count,
        "command_to_page_s": start_s,
        "first_picture_s": first_s,
        "key_to_picture_median_s": float(np.median(total_s)),
        "key_to_picture_p90_s": float(np.quantile(total_s, 0.9)),
        "of_it_pipeline_median_s": float(np.median(pipeline_s)),
        "of_it_pipeline_p90_s": float(np.quantile(pipeline_s, 0.9)),
        "each_key_to_picture_s": [round(float(seconds), 4) for seconds in total_s],
    }


def measure_as_evaluate(name: str) -> dict[str, float]:
    """`evaluate`'s timings of a system: one image alone, and 32 in a batch."""
    system = load_system(name)
    captions = scenes.captions(range(32), WORLD)
    return system.timings(captions, noise_from_seeds(range(32), system.latent_shape))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", default="pocket-student")
    parser.add_argument("--count", type=int, default=30, help="captions typed")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--note", default="", help="a remark for the JSON, for example what else is running"
    )
    args = parser.parse_args()

    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        in_browser = measure_in_browser(args.system, args.count, Path(folder))
    as_evaluate = measure_as_evaluate(args.system)

    result = {
        "command": shlex.join(["python", "benchmarks/serve_latency.py", *sys.argv[1:]]),
        "system": args.system,
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gradio": gradio.__version__,
        "load_before": list(load_before),
        "load_after": list(os.getloadavg()),
        "niceness": os.nice(0),
        "note": args.note,
        "serve": in_browser,
        "evaluate": as_evaluate,
    }
    write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
