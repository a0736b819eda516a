"""Requests that the served pages refuse: by Host, Origin, size; votes of forged voters."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serve.test_app import served

from diffusion2gan.errors import UserError
from diffusion2gan.serve import guard, votes
from diffusion2gan.serve.guard import MAX_BODY_BYTES, Guard
from diffusion2gan.serve.votes import VoteLimit


def run_in_thread(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs it to its end; this thread may have a loop already, that of the browser's driver."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


def send(
    headers: dict[str, str],
    body: list[bytes] | None = None,
    host: str = "127.0.0.1",
    kind: str = "http",
) -> tuple[int, bytes]:
    """The status of a request, and the body that the application received (`-` for none)."""
    chunks = body or [b""]
    messages = []
    for number, chunk in enumerate(chunks):
        more = number + 1 < len(chunks)
        messages.append({"type": "http.request", "body": chunk, "more_body": more})
    received = b"-"
    statuses: list[int] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def store(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        if message["type"] == "websocket.close":
            statuses.append(message["code"])

    async def application(scope: Any, receive: Any, store: Any) -> None:
        nonlocal received
        received = b""
        if scope["type"] == "http" and scope["method"] == "POST":
            received = (await receive())["body"]
        await store({"type": "http.response.start", "status": 200, "headers": []})

    encoded = [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]
    method = "GET" if body is None else "POST"
    scope = {"type": kind, "method": method, "headers": encoded}
    run_in_thread(Guard(application, host)(scope, receive, store))
    return statuses[0], received


@pytest.mark.parametrize(
    ("header", "host", "status"),
    [
        ("127.0.0.1:7860", "127.0.0.1", 200),
        ("127.1.2.3", "127.0.0.1", 200),
        ("LOCALHOST:7860", "127.0.0.1", 200),
        ("[::1]:7860", "127.0.0.1", 200),
        ("evil.example:7860", "127.0.0.1", 403),
        ("localhost.evil.example", "127.0.0.1", 403),
        ("192.168.0.7", "127.0.0.1", 403),
        ("", "127.0.0.1", 403),
        ("[::1", "127.0.0.1", 403),
        ("a" * 10_000, "127.0.0.1", 403),
        ("user@localhost:x", "127.0.0.1", 200),
        ("192.168.0.7", "0.0.0.0", 200),
        ("evil.example", "0.0.0.0", 403),
        (socket.gethostname(), "0.0.0.0", 200),
        ("box.lan:7860", "box.lan", 200),
        ("evil.example", "box.lan", 403),
    ],
)
def test_hosts(header: str, host: str, status: int) -> None:
    for kind in ("http", "websocket"):
        code, received = send({"Host": header}, host=host, kind=kind)
        assert code == (status if kind == "http" or status == 200 else 1008)
        assert (received != b"-") == (status == 200)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1:7860", 200),
        ("https://127.0.0.1:7860", 200),
        ("http://127.0.0.1:9999", 403),
        ("http://localhost:7860", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
    ],
)
def test_origins(origin: str | None, status: int) -> None:
    headers = {"Host": "127.0.0.1:7860"}
    if origin is not None:
        headers["Origin"] = origin
    assert send(headers, [b"x"])[0] == status


@pytest.mark.parametrize(
    ("chunks", "length", "status"),
    [
        ([b"a" * MAX_BODY_BYTES], None, 200),
        ([b"a" * 100] * 3, "300", 200),
        ([b"a" * MAX_BODY_BYTES, b"b"], None, 413),
        ([b"a"], str(MAX_BODY_BYTES + 1), 413),
        ([b"a"], "9" * 1000, 413),
        ([b"a"], "-5", 200),
    ],
)
def test_bodies_are_limited(chunks: list[bytes], length: str | None, status: int) -> None:
    headers = {"Host": "localhost"}
    if length is not None:
        headers["Content-Length"] = length
    code, received = send(headers, chunks)
    assert code == status
    assert received == (b"".join(chunks) if status == 200 else b"-")


def test_a_request_that_never_ends_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.01)
    statuses = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def store(message: Any) -> None:
        statuses.append(message.get("status"))

    async def application(*arguments: Any) -> None:
        raise AssertionError

    scope = {"type": "http", "method": "POST", "headers": [(b"host", b"localhost")]}
    run_in_thread(Guard(application, "127.0.0.1")(scope, receive, store))
    assert statuses[0] == 408


# ------------------------------------------------------------------------------------------- Votes


@pytest.mark.parametrize(
    "value", ["", "x" * 16, "ABCDEF0123456789", "٠" * 16, "0" * 15, "0" * 16 + "\n", 3, None, {}]
)
def test_other_values_are_no_voters(value: object) -> None:
    assert votes.is_voter(votes.new_voter())
    assert not votes.is_voter(value)


def test_votes_per_minute_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(votes.time, "monotonic", lambda: now)
    limit = VoteLimit(per_minute=3)
    for _ in range(3):
        limit.check()
    with pytest.raises(UserError, match="3 votes in the last minute"):
        limit.check()
    now = 61.0
    limit.check()


def test_the_file_of_votes_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes.jsonl"
    votes.append_vote(path, {"voter": "a"})
    before = path.read_bytes()
    monkeypatch.setattr(votes, "MAX_FILE_BYTES", len(before) + 3)
    with pytest.raises(UserError, match="the most that is written"):
        votes.append_vote(path, {"voter": "b"})
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------- Real servers


@pytest.fixture(scope="module")
def vote_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of votes on two folders of images: its address, and the file of votes."""
    folder = tmp_path_factory.mktemp("vote")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for number in range(3):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    arguments = ["--vote", folder / "a", folder / "b", "--prompts", folder / "prompts.txt"]
    with served(folder, *arguments, "--votes", folder / "votes.jsonl") as url:
        yield url.removeprefix("http://"), folder / "votes.jsonl"


def request(
    address: str, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(address, timeout=120)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    # A request that is refused while it is sent: the answer is there
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request(method, path, body, names)
    answer = connection.getresponse()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


class Session:
    """A browser's session with the vote page, without a browser."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.hash = votes.new_voter()
        config = json.loads(request(address, "GET", "/config")[2])
        self.events = {}
        for dependency in config["dependencies"]:
            self.events[dependency["targets"][0][1]] = dependency["id"]

    def call(self, event: str, *data: object) -> str:
        """Sends an event and returns the stream of its answers."""
        body = {"data": data, "fn_index": self.events[event], "session_hash": self.hash}
        encoded = json.dumps(body).encode()
        path = "/gradio_api/queue/join"
        status, _, text = request(
            self.address, "POST", path, encoded, Content_Type="application/json"
        )
        assert status == 200, text
        path = f"/gradio_api/queue/data?session_hash={self.hash}"
        return request(self.address, "GET", path)[2].decode()


@pytest.mark.slow
def test_the_server_refuses_other_names_pages_and_large_bodies(
    vote_server: tuple[str, Path],
) -> None:
    address, _ = vote_server
    port = address.split(":")[1]
    assert request(address, "GET", "/")[0] == 200
    assert request(address, "GET", "/", Host=f"localhost:{port}")[0] == 200

    # Other names, as after DNS rebinding
    for host in ("evil.example", f"evil.example:{port}", "192.0.2.1"):
        assert request(address, "GET", "/config", Host=host)[0] == 403

    # Pages of other ports and sites: refused, and without permission to read the answer
    for origin in ("http://127.0.0.1:1", "http://localhost:3000", "http://evil.example", "null"):
        for method in ("OPTIONS", "POST", "GET"):
            status, headers, _ = request(
                address,
                method,
                "/gradio_api/queue/join",
                Origin=origin,
                Access_Control_Request_Method="POST",
            )
            assert status == 403
            assert not [name for name in headers if name.startswith("access-control")]

    # Large bodies
    for body in (b"x" * (MAX_BODY_BYTES + 1), b"x" * 50_000_000):
        for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/call/vote"):
            assert request(address, "POST", path, body)[0] == 413
    chunked = {"Transfer_Encoding": "chunked"}
    encoded = b"%x\r\n%s\r\n0\r\n\r\n" % (MAX_BODY_BYTES + 1, b"x" * (MAX_BODY_BYTES + 1))
    status, _, _ = request(address, "POST", "/gradio_api/queue/join", encoded, **chunked)
    assert status == 413


@pytest.mark.slow
def test_the_server_writes_no_vote_of_a_forged_voter(vote_server: tuple[str, Path]) -> None:
    address, path = vote_server
    written = set()
    forged = ["x" * 10_000, "", None, 7, {"a": 1}, "../../etc", votes.new_voter()]
    for voter in forged:
        # The page does not take an identifier of another form
        session = Session(address)
        stream = session.call("load", voter if not votes.is_voter(voter) else "")
        assert "0 of 3 pairs done" in stream
        shown = re.search(r'"data":\["([0-9a-f]{16})"', stream)
        assert shown is not None
        written.add(shown[1])

        # The vote is that of the voter to whom the pair was shown
        assert "1 of 3 pairs done" in session.call("click", voter, None, "left", "right")
    found, num_invalid = votes.read_votes(path)
    assert {vote["voter"] for vote in found} == written and num_invalid == 0
    assert len(written) == len(forged)

    # A voter who comes back, and presses Next without answers
    session = Session(address)
    voter = found[0]["voter"]
    assert "1 of 3 pairs done" in session.call("load", voter)
    assert "answer both questions" in session.call("click", voter, None, None, "left")
    assert votes.read_votes(path)[0] == found
