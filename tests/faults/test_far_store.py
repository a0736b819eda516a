"""Every job that takes a URL, on an S3 server with faults: the results are those on a local disk.

A tenth to a third of the requests fail: with status 500, by a reset connection, by a body that is
cut off, or by being slow.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
from cli.runner import run
from distill.run_logs import repeatable_files

from diffusion2gan.pairs import store
from diffusion2gan.runtime import storage
from diffusion2gan.runtime.storage import Location, list_files, parse_location, with_local_copy

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
from runtime.test_storage import Server

FAULTS = ("500", "reset", "cut", "slow")
SHARE = 0.25
SLOW_S = 0.2
SETTINGS = ("loss=mse", "total_pairs=8", "batch_size=4", "adversarial_weight=0.5")
MORE_SETTINGS = ("discriminator=patch", "discriminator_warmup=0")


class FaultyServer(Server):
    """An S3 server that fails at random, by a seed, as soon as `fault` is set."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.num_faults = 0
        self.rng = random.Random(0)
        self.lock = threading.Lock()
        super().__init__()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            fault = self.fault if self.rng.random() < SHARE else None
            self.num_faults += fault is not None
        if fault == "500":
            self.faults = 1
        elif fault == "reset":
            end_connection(environ)
            return []
        elif fault == "slow":
            time.sleep(SLOW_S)
        elif fault == "cut":
            return cut_off(environ, b"".join(super().__call__(environ, start)))
        return super().__call__(environ, start)


def end_connection(environ: dict[str, Any]) -> None:
    """Ends the connection of a request, which would else wait for another one.

    With this option the server resets it when it closes it.
    """
    connection = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)


def cut_off(environ: dict[str, Any], content: bytes) -> Iterator[bytes]:
    """The first half of a body, and then nothing."""
    yield content[: len(content) // 2]
    end_connection(environ)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    faulty = FaultyServer()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{faulty.port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
        monkeypatch.setattr(storage, "LONGEST_PAUSE_S", 0.1)
        storage._filesystem.cache_clear()
        clear_s3fs()
        yield faulty
    faulty.down()
    storage._filesystem.cache_clear()
    clear_s3fs()


def clear_s3fs() -> None:
    """s3fs keeps its connections to a server between tests, whatever the server's address."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def run_jobs(base: str, folder: Path, teacher: Path) -> None:
    """Every job that takes a URL; `base` is a folder or a URL, other outputs are in `folder`."""
    shape: list[object] = ["--num-inference-steps", 2, "--guidance-scale", 1, "--shard-size", 2]
    make = ["pairs", "--teacher", teacher, "--prompts", "pocket", "--count", 8, *shape]
    settings = []
    for setting in (*SETTINGS, *MORE_SETTINGS, f"teacher={teacher}"):
        settings += ["--set", setting]
    pairs = f"{base}/pairs"
    commands: list[list[object]] = [
        [*make, "--out", pairs, "--shard-range", "0:2"],
        [*make, "--out", pairs],
        ["pairs", "info", pairs],
        ["pairs", "verify", pairs],
        ["pairs", "merge", pairs, "--out", f"{base}/merged"],
        ["pairs", "export", pairs, "--out", folder / "tars"],
        ["pairs", "import", folder / "tars", "--out", f"{base}/imported"],
        ["distill", "pocket-regression", "--pairs", pairs, "--out", folder / "run", *settings],
    ]
    for command in commands:
        result = run(*command)
        assert result.code == 0, (command, result.err)


def read_all(location: Location) -> dict[str, bytes]:
    return {name: with_local_copy(location, name, Path.read_bytes) for name in list_files(location)}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the teacher, the results on a local disk)."""
    folder = tmp_path_factory.mktemp("local")
    teacher = tiny_pocket.save(tmp_path_factory.mktemp("far") / "teacher")
    run_jobs(str(folder), folder, teacher)
    return teacher, folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_store_change_nothing(
    fault: str,
    server: FaultyServer,
    local: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import s3fs

    teacher, expected = local
    monkeypatch.setenv("DIFFUSION2GAN_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem().mkdir(f"faults-{fault}")
    base = f"s3://faults-{fault}/x"

    server.fault, server.num_faults = fault, 0
    server.rng.seed(FAULTS.index(fault))
    try:
        run_jobs(base, tmp_path / "out", teacher)
    finally:
        server.fault = None
    print(f"{fault}: {server.num_faults} faults")
    assert server.num_faults >= 5

    for name in ("pairs", "merged", "imported"):
        remote = parse_location(f"{base}/{name}")
        assert read_all(remote) == read_all(expected / name), name
        assert store.open_set(remote) == store.open_set(expected / name)
    for name in ("tars", "run"):
        assert repeatable_files(tmp_path / "out" / name) == repeatable_files(expected / name), name

    # Nothing unfinished is left in the cache
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith(".")]
