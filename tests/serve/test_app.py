"""`serve`: the command, what it refuses, and its pages in headless Chromium."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion2gan.errors import UserError
from diffusion2gan.serve import app, votes
from diffusion2gan.serve.guard import is_loopback

Open = Callable[..., Any]
NO_GRADIO = "gradio is not installed: pip install 'diffusion2gan[demo]'"
WAIT_MS = 120_000  # at most, on a busy machine; an idle one takes seconds
PROMPTS = [
    "a large red ring on sand",
    "<img src=x onerror=alert(1)> a blue star",
    "كرة 🦊",
    "y" * 10_000,
]


# The command line, in a process that reports every connection to, and look-up of, another machine.
WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event == "socket.connect" else arguments
        host = address[0] if isinstance(address, tuple) else None
        if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
            print("OUTSIDE", event, address, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from diffusion2gan.cli import main
main()
"""


@contextmanager
def served(folder: Path, *argv: object) -> Iterator[str]:
    """Runs `diffusion2gan serve ARGV… --port 0` in a process and yields its URL.

    At the end, Ctrl-C must stop it without an error.
    """
    pytest.importorskip("gradio", reason=NO_GRADIO)
    command = [sys.executable, "-c", WATCHED, "serve", *map(str, argv), "--port", "0"]
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        yield wait_for_url(log, process)
        process.send_signal(signal.SIGINT)
        process.wait(WAIT_MS / 1000)
    finally:
        process.kill()
    assert not re.search("Traceback|OUTSIDE", log.read_text()), log.read_text()


def wait_for_url(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Waits until the log has a URL and its port accepts connections."""
    end = time.monotonic() + 3 * WAIT_MS / 1000
    while time.monotonic() < end and process.poll() is None:
        url = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if url:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(url[1]))) == 0:
                    return url[0]
        time.sleep(0.2)
    raise AssertionError(log.read_text())


# ---------------------------------------------------------------------------------------- Refusals


def test_a_port_in_use_is_refused_with_the_remedy() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=f"--port {port}: cannot listen on it .*name another with --port"
        ):
            app.check_port("127.0.0.1", port)
    assert app.check_port("127.0.0.1", 0) > 0


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1"):
        app.check_port("192.0.2.1", 0)


def test_loopback_hosts_are_recognised() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "192.168.0.7", "example"):
        assert not is_loopback(host), host


def test_missing_gradio_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with (
        pytest.raises(UserError, match=r"pip install 'diffusion2gan\[demo\]'"),
        app.prepare_gradio("127.0.0.1", 0),
    ):
        pass


def test_equal_systems_and_too_many_prompts_are_refused(tmp_path: Path) -> None:
    options = {"host": "127.0.0.1", "port": 0, "seed": 0}
    with pytest.raises(UserError, match="name two different systems"):
        app.serve_vote(("a", "a"), ["x"], tmp_path / "v", **options)
    with pytest.raises(UserError, match="2001 prompts, but at most 2000"):
        app.serve_vote(("a", "b"), ["x"] * 2001, tmp_path / "v", **options)


def test_a_folder_of_images_cannot_be_served_as_a_student(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason=NO_GRADIO)
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    with pytest.raises(UserError, match="is a folder of images and cannot generate new ones"):
        app.serve_student(
            str(tmp_path), None, host="127.0.0.1", port=0, history=tmp_path / "history"
        )


def test_images_of_different_sizes_are_shown_at_the_smaller_size() -> None:
    pages = pytest.importorskip("diffusion2gan.serve.pages", reason=NO_GRADIO)
    small = Image.new("RGB", (64, 64))
    large = Image.new("RGB", (512, 512))
    assert [image.size for image in pages.match_sizes(large, small)] == [(64, 64), (64, 64)]
    assert pages.match_sizes(large, large) == (large, large)


# ------------------------------------------------------------------------------ Pages in a browser


@pytest.mark.slow
def test_the_student_page_generates_saves_and_restores_images(
    tmp_path: Path, open_page: Open
) -> None:
    arguments = ["pocket-student", "--teacher", "pocket-teacher@2"]
    with served(tmp_path, *arguments, "--history", tmp_path / "history") as url:
        page = open_page(url)
        page.set_default_timeout(WAIT_MS)
        prompt = page.locator("#prompt textarea, #prompt input")

        # The student's image appears while typing, the teacher's at the press of a button
        prompt.press_sequentially("a large red ring on sand")
        page.wait_for_selector("#student img")
        page.get_by_text(re.compile(r"1 step · seed 0 · a large red ring on sand")).wait_for()
        page.click("#ask")
        page.wait_for_selector("#teacher img")
        page.get_by_text(re.compile(r"2 steps · seed 0 · a large red ring on sand")).wait_for()

        # A prompt that looks like HTML is shown as text; Enter saves its image
        prompt.fill("<img src=x onerror=alert(1)> كرة 🦊")
        page.locator("#student-note", has_text="<img src=x onerror=alert(1)> كرة 🦊").wait_for()
        prompt.press("Enter")
        page.wait_for_function("document.querySelectorAll('#kept img').length == 2")

        # A prompt that is too long is refused
        prompt.fill("z" * 10_000)
        page.get_by_text("the prompt has 10000 characters, and at most 2000").first.wait_for()

        # Many seeds: too many are refused
        prompt.fill("a blue star")
        page.get_by_role("tab", name="Many seeds").click()
        refusal = page.get_by_text("1000 images were requested, but a request").first
        request_images(page, "1000", refusal)
        request_images(page, "5", page.locator("#many-note", has_text="5 images in"))
        page.wait_for_function("document.querySelectorAll('#many img').length == 5")

        # Saved images are still there after a reload
        page.reload()
        page.wait_for_function("document.querySelectorAll('#kept img').length == 2")
        page.context.close()

    saved = []
    for path in sorted((tmp_path / "history").glob("*.png")):
        saved.append(json.loads(Image.open(path).info["diffusion2gan"]))
    generated_by = [(entry["system"], entry["num_inference_steps"]) for entry in saved]
    assert generated_by == [("pocket-teacher", 2), ("pocket-student", 1)]
    assert saved[1]["prompt"] == "<img src=x onerror=alert(1)> كرة 🦊"


def request_images(page: Any, count: str, expected: Any) -> None:
    """Requests `count` images and waits for `expected`.

    Gradio may set a number of a tab that was just opened back to its first value. A person sees
    that and enters it again, as is done here: four times at most.
    """
    from playwright.sync_api import TimeoutError

    number = page.locator("#how-many input")
    for attempts_left in (3, 2, 1, 0):
        number.fill(count)
        page.click("#make-many")
        try:
            expected.wait_for(timeout=WAIT_MS)
            return
        except TimeoutError:
            if attempts_left == 0 or number.input_value() == count:
                raise


def answer(page: Any, realism: str, alignment: str) -> None:
    """Answers both questions, presses Next and waits for the next pair, without answers."""
    num_done = int(page.inner_text("#line").split()[0])
    page.locator("#realism").get_by_label(realism).check()
    page.locator("#alignment").get_by_label(alignment).check()
    page.click("#next")
    page.locator("#line", has_text=f"{num_done + 1} of {len(PROMPTS)} pairs done").wait_for()
    page.wait_for_function(
        "!document.querySelector('#realism input:checked, #alignment input:checked')"
    )


@pytest.mark.slow
def test_two_voters_vote_blind_and_no_vote_is_lost(tmp_path: Path, open_page: Open) -> None:
    prompts_file, votes_file = tmp_path / "prompts.txt", tmp_path / "votes.jsonl"
    prompts_file.write_text("\n".join(PROMPTS), encoding="utf-8")
    arguments = ["--vote", "pocket-student", "pocket-teacher@2"]
    with served(tmp_path, *arguments, "--prompts", prompts_file, "--votes", votes_file) as url:
        # Neither voter sees the name of a system
        first, second = open_page(url), open_page(url)
        for page in (first, second):
            page.set_default_timeout(WAIT_MS)
            page.wait_for_selector("#right img")
            assert page.inner_text("#line") == "0 of 4 pairs done"
            assert "pocket" not in page.inner_text("body")
            assert page.locator("#left img").get_attribute("alt") == "left image"
            assert page.locator("#right img").get_attribute("alt") == "right image"

        # Next without answers is refused
        first.click("#next")
        first.get_by_text("answer both questions").first.wait_for()

        # A phone shows both images, side by side, and every button without scrolling
        phone = open_page(url, viewport={"width": 390, "height": 664})
        phone.set_default_timeout(WAIT_MS)
        phone.wait_for_selector("#right img")
        left, right = (phone.locator(f"#{side} img").bounding_box() for side in ("left", "right"))
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
        assert min(left["width"], left["height"]) > 140  # pocket images have 64 pixels
        for name in ("#left img", "#right img", "#realism", "#alignment", "#next"):
            box = phone.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, name
            assert box["y"] >= 0 and box["y"] + box["height"] <= 664, name
        for label in phone.locator("#questions label").all():
            box = label.bounding_box()
            assert box["x"] + box["width"] <= 390 and box["height"] < 50
        phone.context.close()

        # Both vote in turns; the first reloads the page and continues
        for _ in range(2):
            answer(first, "Left", "Right")
            answer(second, "Right", "Right")
        first.reload()
        first.wait_for_selector("#right img")
        first.get_by_text("2 of 4 pairs done").wait_for()
        for _ in range(2):
            answer(first, "Left", "No difference")
        first.get_by_text("Thank you! You have voted on all 4 pairs.").wait_for()
        first.context.close()
        second.context.close()

    # All votes are in the file
    found, num_invalid = votes.read_votes(votes_file)
    assert num_invalid == 0
    by_voter: dict[str, list[dict[str, Any]]] = {}
    for vote in found:
        by_voter.setdefault(vote["voter"], []).append(vote)
    by_second, by_first = sorted(by_voter.values(), key=len)
    assert (len(by_first), len(by_second)) == (4, 2)
    assert {vote["prompt"] for vote in by_first} == set(PROMPTS)
    assert all(vote["realism"] == vote["left"] for vote in by_first)
    assert [vote["alignment"] for vote in by_first].count(None) == 2
    head = votes.summarize(votes_file)[0]
    assert head == "pocket-student against pocket-teacher@2: 6 votes, 2 voters, 4 prompts"

    # A different study cannot use it
    other_study = votes.Study("pocket-student", "pocket-teacher@2", "other")
    with pytest.raises(UserError, match="Name another file with --votes"):
        votes.check_study(votes_file, other_study)
