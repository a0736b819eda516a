"""`serve` as its users meet it: the command, its refusals, and its pages in headless Chromium."""

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
from diffusion2gan.serve import serve, votes

Open = Callable[..., Any]
WAIT_MS = 120_000  # at most, on a machine that is busy with other things; an idle one takes seconds
PROMPTS = [
    "a large red ring on sand",
    "<img src=x onerror=alert(1)> a blue star",
    "كرة 🦊",
    "y" * 10_000,
]


# The command line, in a process that tells whenever something in it asks for a host or connects beyond this machine.
WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        place = arguments[1] if event == "socket.connect" else arguments
        host = place[0] if isinstance(place, tuple) else None
        if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
            print("OUTSIDE", event, place, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from diffusion2gan.cli import main
main()
"""


@contextmanager
def served(folder: Path, *argv: object) -> Iterator[str]:
    """`diffusion2gan serve ARGV… --port 0` in a process of its own; its address. Ctrl-C ends it cleanly."""
    pytest.importorskip(
        "gradio", reason="gradio is not installed: pip install 'diffusion2gan[demo]'"
    )
    command = [sys.executable, "-c", WATCHED, "serve", *map(str, argv), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        yield wait_for(log, process)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    assert not re.search("Traceback|OUTSIDE", log.read_text()), log.read_text()


def wait_for(log: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + 3 * WAIT_MS / 1000
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(found[1]))) == 0:
                    return found[0]
        time.sleep(0.2)
    raise AssertionError(log.read_text())


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=f"--port {port}: cannot listen there .*name another with --port"
        ):
            serve.check_port("127.0.0.1", port)
    assert serve.check_port("127.0.0.1", 0) > 0


def test_a_host_that_is_none_of_ours_is_told() -> None:
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1"):
        serve.check_port("192.0.2.1", 0)
    hosts = ["127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.0.7", "example"]
    assert [serve.is_loopback(host) for host in hosts] == [True] * 3 + [False] * 3


def test_without_gradio_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with (
        pytest.raises(UserError, match=r"pip install 'diffusion2gan\[demo\]'"),
        serve.gradio_ready("127.0.0.1", 0),
    ):
        pass


def test_systems_that_do_not_differ_and_too_many_prompts(tmp_path: Path) -> None:
    options = {"host": "127.0.0.1", "port": 0, "seed": 0}
    with pytest.raises(UserError, match="name two systems that differ"):
        serve.serve_vote(("a", "a"), ["x"], tmp_path / "v", **options)
    with pytest.raises(UserError, match="at most 2000"):
        serve.serve_vote(("a", "b"), ["x"] * 2001, tmp_path / "v", **options)


def test_a_folder_of_pictures_makes_none_to_serve(tmp_path: Path) -> None:
    pytest.importorskip(
        "gradio", reason="gradio is not installed: pip install 'diffusion2gan[demo]'"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    with pytest.raises(UserError, match="is a folder of pictures and makes no new ones"):
        serve.serve_student(
            str(tmp_path), None, host="127.0.0.1", port=0, history=tmp_path / "history"
        )


def test_pictures_of_two_sizes_are_shown_at_one() -> None:
    pages = pytest.importorskip("diffusion2gan.serve.pages", reason="gradio is not installed")
    small, large = Image.new("RGB", (64, 64)), Image.new("RGB", (512, 512))
    assert [one.size for one in pages.same_size(large, small)] == [(64, 64)] * 2
    assert pages.same_size(large, large) == (large, large)


# ------------------------------------------------------------------------------------------------- pages in a browser


@pytest.mark.slow
def test_type_and_a_picture_arrives(tmp_path: Path, open_page: Open) -> None:
    """Typing, the teacher beside it, odd prompts, too many pictures, and a history that outlives a reload."""
    with served(
        tmp_path,
        "pocket-student",
        "--teacher",
        "pocket-teacher@2",
        "--history",
        tmp_path / "history",
    ) as url:
        page = open_page(url)
        page.set_default_timeout(WAIT_MS)
        prompt = page.locator("#prompt textarea, #prompt input")
        prompt.press_sequentially("a large red ring on sand")
        page.wait_for_selector("#student img")
        page.get_by_text(re.compile(r"1 step · seed 0 · a large red ring on sand")).wait_for()
        page.click("#ask")
        page.wait_for_selector("#teacher img")
        page.get_by_text(re.compile(r"2 steps · seed 0 · a large red ring on sand")).wait_for()

        prompt.fill("<img src=x onerror=alert(1)> كرة 🦊")
        page.locator("#student-note", has_text="<img src=x onerror=alert(1)> كرة 🦊").wait_for()
        prompt.press("Enter")
        page.wait_for_function("document.querySelectorAll('#kept img').length == 2")
        prompt.fill("z" * 10_000)
        page.get_by_text("the prompt has 10000 characters, and at most 2000").first.wait_for()

        prompt.fill("a blue star")
        page.get_by_role("tab", name="Many seeds").click()
        page.locator("#how-many input").fill("1000")
        page.click("#make-many")
        page.get_by_text("1000 pictures asked for, and one request makes 1 to 64").first.wait_for()
        page.locator("#how-many input").fill("5")
        page.click("#make-many")
        page.wait_for_function("document.querySelectorAll('#many img').length == 5")

        page.reload()
        page.wait_for_function("document.querySelectorAll('#kept img').length == 2")
        page.context.close()
    kept = sorted((tmp_path / "history").glob("*.png"))
    about = [json.loads(Image.open(path).info["diffusion2gan"]) for path in kept]
    made_by = [(one["system"], one["num_inference_steps"]) for one in about]
    assert made_by == [("pocket-teacher", 2), ("pocket-student", 1)]
    assert about[1]["prompt"] == "<img src=x onerror=alert(1)> كرة 🦊"


def answer(page: Any, realism: str, alignment: str) -> None:
    """Answers both questions and goes on; the next pair is then there, its questions unanswered."""
    num_voted = int(page.inner_text("#line").split()[0])
    page.locator("#realism").get_by_label(realism).check()
    page.locator("#alignment").get_by_label(alignment).check()
    page.click("#next")
    page.locator("#line", has_text=f"{num_voted + 1} of {len(PROMPTS)} voted").wait_for()
    page.wait_for_function(
        "!document.querySelector('#realism input:checked, #alignment input:checked')"
    )


@pytest.mark.slow
def test_two_voters_vote_blind_and_lose_nothing(tmp_path: Path, open_page: Open) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = (
        "--vote",
        "pocket-student",
        "pocket-teacher@2",
        "--prompts",
        tmp_path / "prompts.txt",
    )
    options += ("--votes", tmp_path / "votes.jsonl")
    with served(tmp_path, *options) as url:
        first, second = open_page(url), open_page(url)
        for page in (first, second):
            page.set_default_timeout(WAIT_MS)
            page.wait_for_selector("#right img")
            assert page.inner_text("#line") == "0 of 4 voted" and "pocket" not in page.inner_text(
                "body"
            )
        first.click("#next")
        first.get_by_text("answer both questions").first.wait_for()
        for _ in range(2):
            answer(first, "Left", "Right")
            answer(second, "Right", "Right")
        first.reload()
        first.wait_for_selector("#right img")
        first.get_by_text("2 of 4 voted").wait_for()
        for _ in range(2):
            answer(first, "Left", "Left")
        first.get_by_text("Thank you: all 4 pairs are voted on.").wait_for()
        first.context.close()
        second.context.close()
    found, num_bad = votes.read_votes(tmp_path / "votes.jsonl")
    assert num_bad == 0 and len(found) == 6 and len({vote["voter"] for vote in found}) == 2
    by_first = [vote for vote in found if sum(v["voter"] == vote["voter"] for v in found) == 4]
    assert {vote["prompt"] for vote in by_first} == set(PROMPTS)
    assert all(vote["realism"] == vote["left"] for vote in by_first)
    head = votes.summary(tmp_path / "votes.jsonl")[0]
    assert head == "pocket-student against pocket-teacher@2: 6 votes, 2 voters, 4 prompts"
    with pytest.raises(UserError, match="Name another file with --votes"):
        votes.check_study(
            tmp_path / "votes.jsonl", votes.Study("pocket-student", "pocket-teacher@2", "other")
        )
