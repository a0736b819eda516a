"""Fixtures that several tests share. It is imported first, so it imports nothing heavy itself."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Parallel test processes use one thread each, a single one uses two.
DEFAULT_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", DEFAULT_THREADS))

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Waiting threads sleep: much faster beside other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# For the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))


def pytest_collection_finish() -> None:
    """Sets the same number of threads everywhere, if a test module has loaded torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(NUM_THREADS)


def seed_all(seed: int) -> None:
    """Seeds the global random number generators of Python and, if they are loaded, of NumPy and
    torch.
    """
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


# Every fixture and every test starts from a fixed seed: its random numbers depend neither on the
# tests that ran before it nor on which tests are selected. Fixtures have different seeds, so that a
# test does not draw its inputs from the numbers that are its fixtures' weights.


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    seed_all(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed_all(0)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete pocket pipeline with random weights (seed 0)."""
    import torch

    from diffusion2gan.pocket import models

    torch.set_num_threads(NUM_THREADS)
    folder = tmp_path_factory.mktemp("tiny_teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models.pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def sd_style_teacher(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with Stable Diffusion 1.5's scheduler file.

    That is: PNDM, ε prediction, leading timesteps, ᾱ below 1 at the end.
    """
    from diffusers import PNDMScheduler

    folder = tmp_path_factory.mktemp("sd_style") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    ).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name → the folder of its tiny pipeline, saved once per session."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        from tiny_families import save

        return root / name if (root / name).exists() else save(name, root / name)

    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The installed Chromium, driven by playwright. Skips the test if either is missing."""
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip("no chromium on PATH: the pages are not tested in a browser")
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed: the pages are not tested in a browser",
    )
    arguments = [
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, **context)` → a page.

    At the end the test fails if a page requested anything but its `url`'s origin, or logged an
    error.
    """
    contexts: list[Any] = []
    problems: list[str] = []

    def open_(url: str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        origin = "/".join(url.split("/")[:3])

        def on_request(request: Any) -> None:
            if not request.url.startswith((origin, "data:", "blob:")):
                problems.append(request.url)

        def on_console(message: Any) -> None:
            if message.type == "error":
                problems.append(message.text)

        def on_page_error(error: Any) -> None:
            # A page that is left or reloaded aborts its open requests, and reports it: no error.
            if error.name != "AbortError":
                problems.append(str(error))

        page.on("request", on_request)
        page.on("console", on_console)
        page.on("pageerror", on_page_error)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems, problems
