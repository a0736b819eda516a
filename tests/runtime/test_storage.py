"""Files in an object store: atomic writes, retries, a bounded cache. A real S3 server (moto)."""

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
    """moto's S3 on 127.0.0.1; it can return status 500, and go down and up again on its port."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self.port, self.faults, self.num_requests = 0, 0, 0
        self.up()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.num_requests += 1
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


def write(location: storage.Location, shards: range = range(3), spec: PairsSpec = SPEC) -> None:
    store.start_set(location, spec)
    for shard in shards:
        seeds = [pair_seed(3, i) for i in spec.shard_indices(shard)]
        pairs = Pairs(
            list(spec.shard_indices(shard)),
            seeds,
            [f"p{i}" for i in seeds],
            -noise_from_seeds(seeds, (4, 2, 3)),
        )
        store.write_shard(location, shard, spec, pairs)


def write_bytes(location: storage.Location, name: str, content: bytes) -> None:
    with atomic_put(location, name) as temporary:
        temporary.write_bytes(content)


def test_a_set_in_an_object_store_reads_like_a_local_one(bucket: Remote, tmp_path: Path) -> None:
    write(bucket)
    write(tmp_path / "local")
    assert store.open_set(bucket) == SPEC and verify(bucket) == []
    assert "10 of 10 pairs" in info(bucket, time.time())["made"]
    assert set(list_files(bucket)) == set(list_files(tmp_path / "local"))
    remote, local = (
        PairReader(location, 0).batches(4) for location in (bucket, tmp_path / "local")
    )
    for _ in range(8):
        a, b = next(remote), next(local)
        assert a.index == b.index and a.latents.equal(b.latents)
    with pytest.raises(UserError, match=r"already contains other pairs"):
        store.start_set(bucket, PairsSpec("t", "r", "p", 11, 3, 5, 3.0, (4, 2, 3), 4))


def test_server_errors_are_retried(
    bucket: Remote, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        server.faults = 2
        write(bucket, range(number, number + 1))
    server.faults = 2
    assert verify(bucket) == []


def test_a_store_that_stays_unreachable_is_a_failure(
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
def test_a_server_outage_of_ten_seconds_is_survived(bucket: Remote, server: Server) -> None:
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
    num_requests = server.num_requests
    assert with_local_copy(bucket, "a", Path.read_bytes) == b"a" * 1000
    assert server.num_requests - num_requests == 1  # only its version was looked up
    write_bytes(bucket, "a", b"new")
    assert with_local_copy(bucket, "a", Path.read_bytes) == b"new"
    with pytest.raises(FileNotFoundError):
        with_local_copy(bucket, "nothing", Path.read_bytes)


def test_missing_packages_protocols_and_credentials_are_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_missing_bucket_is_named(server: Server) -> None:
    with pytest.raises(
        UserError, match=r"s3://no-such-bucket/set cannot be written.*Make the bucket or"
    ):
        write_bytes(parse_location("s3://no-such-bucket/set"), "x", b"x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_errors_of_the_local_disk_are_not_retried(number: int) -> None:
    calls = []

    def full() -> None:
        calls.append(1)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        storage.retry_with_backoff("fetch x", full)
    assert len(calls) == 1


def test_a_full_disk_during_a_download_is_a_failure(
    bucket: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(bucket, "x", b"x")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage._filesystem(bucket.url)[0], "get_file", full)
    with pytest.raises(Failure, match="the disk is full"):
        fetch_file(bucket, "x")
