"""What every test shares. Imported before each run, so it imports nothing heavy itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NUM_THREADS = int(
    os.environ.get("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # threads that wait sleep: much faster beside other processes
os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))  # for the commands that tests start


def pytest_collection_finish() -> None:
    """The same number of threads everywhere, where a test module has loaded torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole pocket pipeline, its weights random (seed 0)."""
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
    """The same weights under Stable Diffusion 1.5's own scheduler file: PNDM, ε, leading steps, no ᾱ = 1 at the end."""
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
    """name → the folder of that family's tiny pipeline, made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        from tiny_families import save

        return root / name if (root / name).exists() else save(name, root / name)

    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The installed Chromium, driven by playwright; skips where either is missing."""
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip("no chromium on PATH: the pages are not tried in a browser")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: no browser tests"
    )
    arguments = [
        "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`open_page(url, **context)` → a page. Nothing but `url`'s own origin is reached; no error is logged meanwhile."""
    contexts, problems = [], []

    def open_(url: str, **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        home = "/".join(url.split("/")[:3])
        page.on(
            "request",
            lambda r: (
                None if r.url.startswith((home, "data:", "blob:")) else problems.append(r.url)
            ),
        )
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        # A page that is left or loaded anew aborts the requests it had open, and says so: that is no fault of it.
        page.on(
            "pageerror",
            lambda error: None if error.name == "AbortError" else problems.append(str(error)),
        )
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems, problems
