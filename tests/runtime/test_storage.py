"""Files in an object store: whole or not at all, patient with its faults, a bounded cache. A real S3 server (moto)."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import noise_from_seeds, pair_seed
from diffusion2gan.pairs import store
from diffusion2gan.pairs.check import info, verify
from diffusion2gan.pairs.sampler import PairReader
from diffusion2gan.pairs.store import Pairs, PairsSpec
from diffusion2gan.runtime import storage
from diffusion2gan.runtime.storage import (
    Remote,
    atomic_put,
    fetch_file,
    list_files,
    parse_location,
    with_local_copy,
)

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
SPEC = PairsSpec("t", "r", "p", 10, 3, 5, 3.0, (4, 2, 3), 4)


class Server:
    """moto's S3 on 127.0.0.1, which can be told to answer 500 and can go away and come back on its port."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self.port, self.faults, self.asked = 0, 0, 0
        self.up()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.asked += 1
        if self.faults > 0:
            self.faults -= 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"out of order"]
        return self._app(environ, start)

    def up(self) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def down(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    names = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_MAX_ATTEMPTS": "1",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    yield server
    server.down()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture
def server(running: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("DIFFUSION2GAN_CACHE", str(tmp_path / "cache"))
    running.faults = 0
    return running


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> Remote:
    import s3fs

    name = f"b{abs(hash(request.node.name))}"
    s3fs.S3FileSystem().mkdir(name)
    remote = parse_location(f"s3://{name}/set/")
    assert isinstance(remote, Remote)
    return remote


def write(place: storage.Location, shards: range = range(3), spec: PairsSpec = SPEC) -> None:
    store.start_set(place, spec)
    for shard in shards:
        seeds = [pair_seed(3, i) for i in spec.shard_indices(shard)]
        pairs = Pairs(
            list(spec.shard_indices(shard)),
            seeds,
            [f"p{i}" for i in seeds],
            -noise_from_seeds(seeds, (4, 2, 3)),
        )
        store.write_shard(place, shard, spec, pairs)


def write_bytes(place: storage.Location, name: str, content: bytes) -> None:
    with atomic_put(place, name) as temporary:
        temporary.write_bytes(content)


def test_a_set_in_a_store_is_a_set(bucket: Remote, tmp_path: Path) -> None:
    write(bucket)
    write(tmp_path / "here")
    assert store.open_set(bucket) == SPEC and verify(bucket) == []
    assert "10 of 10 pairs" in info(bucket, time.time())["made"]
    assert set(list_files(bucket)) == set(list_files(tmp_path / "here"))
    ours, theirs = (PairReader(place, 0).batches(4) for place in (bucket, tmp_path / "here"))
    for _ in range(8):
        a, b = next(ours), next(theirs)
        assert a.index == b.index and a.latents.equal(b.latents)
    with pytest.raises(UserError, match=r"already holds other pairs"):
        store.start_set(bucket, PairsSpec("t", "r", "p", 11, 3, 5, 3.0, (4, 2, 3), 4))


def test_faults_are_waited_out(
    bucket: Remote, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        server.faults = 2
        write(bucket, range(number, number + 1))
    server.faults = 2
    assert verify(bucket) == []


def test_a_store_that_stays_away_is_a_failure(
    bucket: Remote, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(bucket, range(2))
    monkeypatch.setattr(storage, "RETRY_TIMEOUT_S", 1.0)
    server.faults = 10**6
    with pytest.raises(Failure, match=r"unreachable for 1 s .*run the same command to continue"):
        write_bytes(bucket, "pairs-00002.parquet", b"x" * 1000)
    with pytest.raises(Failure, match="unreachable"):
        store.read_shard(bucket, 0, spec=SPEC)
    server.faults = 0
    assert set(list_files(bucket)) == {"pairs.json", "pairs-00000.parquet", "pairs-00001.parquet"}
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_block_that_fails_uploads_nothing(bucket: Remote) -> None:
    with pytest.raises(TypeError, match="str"):
        write_bytes(bucket, "x", "a text")  # type: ignore[arg-type]
    assert list_files(bucket) == {}


@pytest.mark.slow
def test_a_server_that_vanishes_for_ten_seconds(bucket: Remote, server: Server) -> None:
    write(bucket, range(2))
    server.down()
    returning = threading.Event()

    def come_back() -> None:
        returning.set()
        server.up()

    timer = threading.Timer(10.0, come_back)
    timer.start()
    write(bucket, range(2, 3))
    assert returning.is_set()  # the write has waited for the server
    timer.join()
    assert verify(bucket) == []


def test_the_cache_is_bounded_and_never_stale(
    bucket: Remote, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSION2GAN_CACHE_GIB", str(2500 / 2**30))
    for name in "abc":
        write_bytes(bucket, name, name.encode() * 1000)
    a = fetch_file(bucket, "a")
    fetch_file(bucket, "b")
    os.utime(a, (time.time() + 5,) * 2)  # used last
    fetch_file(bucket, "c")
    kept = sorted(path.name[-1] for path in (tmp_path / "cache").iterdir())
    assert kept == ["a", "c"]
    asked = server.asked
    assert with_local_copy(bucket, "a", Path.read_bytes) == b"a" * 1000
    assert server.asked - asked == 1  # a look at its version, no more
    write_bytes(bucket, "a", b"new")
    assert with_local_copy(bucket, "a", Path.read_bytes) == b"new"
    with pytest.raises(FileNotFoundError):
        with_local_copy(bucket, "nothing", Path.read_bytes)


def test_what_a_store_needs_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with pytest.raises(UserError, match="Protocol not known: nowhere"):
        parse_location("nowhere://x/y")
    storage._filesystem.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        patch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        with pytest.raises(UserError, match=r"pip install 'diffusion2gan\[s3\]'"):
            parse_location("s3://never-seen/y")

    class NoCredentialsError(Exception):
        pass

    def refuse() -> None:
        raise NoCredentialsError("Unable to locate credentials")

    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        storage.retry_with_backoff("fetch x", refuse)
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID"):
        storage.retry_with_backoff(
            "fetch x", lambda: (_ for _ in ()).throw(PermissionError("Forbidden"))
        )


def test_a_bucket_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(
        UserError, match=r"s3://no-such-bucket/set cannot be written.*Make the bucket or"
    ):
        write_bytes(parse_location("s3://no-such-bucket/set"), "x", b"x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_disk_that_takes_nothing_is_no_fault_of_the_store(number: int) -> None:
    calls = []

    def full() -> None:
        calls.append(1)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        storage.retry_with_backoff("fetch x", full)
    assert len(calls) == 1


def test_a_full_disk_is_told_where_a_fetch_meets_it(
    bucket: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(bucket, "x", b"x")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage._filesystem(bucket.url)[0], "get_file", full)
    with pytest.raises(Failure, match="the disk is full"):
        fetch_file(bucket, "x")
