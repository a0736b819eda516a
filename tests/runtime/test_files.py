"""Atomic writing of files, folders, JSON and images."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime import checkpoint, files
from diffusion2gan.runtime.files import atomic_write, read_json, sha256, write_image, write_json
from diffusion2gan.runtime.images import contact_sheet, from_uint8, to_uint8


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_creates_folders_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
            assert temporary.name == path.name
            assert temporary.parent.parent == path.parent  # on one file system a rename is atomic
        assert path.read_text() == text and names(path.parent) == ["file"]


def test_temporaries_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Only those of this machine; a folder set aside only once a new one has replaced it."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = tmp_path / "x"
    mine = [f".x.{files.HOST}-{dead.pid}.tmp", f".x.{files.HOST}-{dead.pid}.tmp.png"]
    others = [
        f".x.another-{dead.pid}.tmp",
        f".x.{files.HOST}-{os.getppid()}.tmp",
        f".y.{files.HOST}-{dead.pid}.tmp",
    ]
    for name in (*mine, *others):
        (tmp_path / name).write_text("half")
    aside = tmp_path / f".x.{files.HOST}-{dead.pid}.old"
    (aside / "deep").mkdir(parents=True)
    with atomic_write(path) as temporary:
        assert names(tmp_path) == sorted([*others, aside.name, temporary.parent.name])
        temporary.write_text("new")
    assert names(tmp_path) == sorted([*others, "x"])


def test_a_killed_writer_leaves_nothing_that_the_next_one_keeps(tmp_path: Path) -> None:
    """Whatever the library wrote before the kill: safetensors writes to a hidden name first."""
    path = tmp_path / "x.safetensors"
    program = (
        "import os, signal, sys; from diffusion2gan.runtime.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.with_name('.tmpAbCdEf').write_text('half')\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL and not path.exists()
    checkpoint.save(path, {"x": torch.zeros(3)}, {})
    assert names(tmp_path) == ["x.safetensors"]


def test_a_folder_is_replaced_with_nothing_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("a", "b"):
        with atomic_write(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert names(path) == ["b"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EACCES, "no")]
)
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:  # noqa: PT012
        temporary.mkdir()
        (temporary / "new").write_text("new")
        raise KeyboardInterrupt
    assert names(path) == ["old"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_written_files_have_the_permissions_of_a_new_file(umask: int, tmp_path: Path) -> None:
    """safetensors alone writes files that only their owner can read."""
    previous = os.umask(umask)
    try:
        save_file({"x": torch.zeros(3)}, tmp_path / "direct.safetensors")
        checkpoint.save(tmp_path / "file.safetensors", {"x": torch.zeros(3)}, {})
        with atomic_write(tmp_path / "folder") as folder:
            (folder / "unet").mkdir(parents=True)
            save_file({"x": torch.zeros(3)}, folder / "unet" / "w.safetensors")
            (folder / "run.sh").touch(0o755)
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)

    modes = {}
    for file in tmp_path.rglob("*"):
        if file.is_file():
            modes[file.name] = file.stat().st_mode & 0o777
    assert modes.pop("direct.safetensors") == 0o600
    assert modes.pop("run.sh") == 0o777 & ~umask
    assert modes == dict.fromkeys(("file.safetensors", "w.safetensors"), 0o666 & ~umask)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_failure(tmp_path: Path, number: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with (
        pytest.raises(
            Failure, match=r"disk is full: could not write .*file.*run the same command again"
        ),
        atomic_write(path),
    ):
        raise OSError(number, "full")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses files over 4 KiB, as it refuses them on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
    "parquet": lambda path: pq.write_table(
        pa.table({"x": np.random.default_rng(0).random(100_000)}), path
    ),
    "text": lambda path: path.write_text("x" * 100_000),
}


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_detected_in_every_writing_library(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Failure, match="disk is full"), atomic_write(path) as temporary:
        WRITERS[writer](temporary)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, {"x": torch.ones(3)}, {"step": 1})
    with pytest.raises(Failure, match="disk is full"):
        checkpoint.save(path, {"x": torch.ones(100_000)}, {"step": 2})
    assert checkpoint.load(path)[1] == {"step": 1} and names(tmp_path) == ["checkpoint.safetensors"]


def test_json_is_written_and_read_and_bad_files_are_refused(tmp_path: Path) -> None:
    value = {"words": "“ünï” ✓", "numbers": [1, 2.5, 1e-30], "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "b.json")
    for content in (b"{", b"", b"\xff\xfe"):
        (tmp_path / "c.json").write_bytes(content)
        with pytest.raises(UserError, match=r"c\.json is not JSON"):
            read_json(tmp_path / "c.json")


def test_sha256_depends_on_the_contents_alone(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"abc")
    assert sha256(tmp_path / "one") == hashlib.sha256(b"abc").hexdigest()
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        (folder / "unet").mkdir(parents=True)
        save_file({"x": torch.ones(3)}, folder / "unet" / "w.safetensors")
    (folders[1] / "README.md").write_text("not a weight")
    assert sha256(folders[0]) == sha256(folders[1])
    save_file({"x": torch.zeros(3)}, folders[1] / "unet" / "w.safetensors")
    assert sha256(folders[0]) != sha256(folders[1])


def test_images_are_converted_arranged_and_written_atomically(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
    assert np.array_equal(to_uint8(from_uint8(pictures)), pictures)
    greys = to_uint8(torch.tensor([-9.0, -1, 0, 1, 9]).expand(1, 3, 1, 5))[0, 0, :, 0]
    assert np.array_equal(greys, [0, 0, 128, 255, 255])
    whole_sheet = contact_sheet(from_uint8(pictures), columns=3)
    assert whole_sheet.size == (3 * 8 - 2, 2 * 7 - 2)
    assert np.array_equal(np.asarray(whole_sheet)[7:12, 0:6], pictures[3])
    write_image(tmp_path / "a.png", whole_sheet.save)
    with pytest.raises(ValueError, match="stop"), atomic_write(tmp_path / "a.png"):
        raise ValueError("stop")
    assert names(tmp_path) == ["a.png"]


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    for number, text in enumerate(("[" * 100_000, '{"a":' * 100_000, "1" * 10_000)):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(UserError, match="is not JSON"):
            read_json(path)


def test_temporary_folders_of_killed_processes_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f"serve.{files.HOST}-{dead.pid}.abc" / "deep").mkdir(parents=True)
    kept = [
        f"serve.another-{dead.pid}.abc",
        f"serve.{files.HOST}-{os.getppid()}.abc",
        f"other.{files.HOST}-{dead.pid}.abc",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    with files.temporary_folder("serve") as folder:
        assert folder.parent == tmp_path and folder.is_dir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert names(tmp_path) == sorted([*kept, folder.name])
    assert names(tmp_path) == sorted(kept)

    # Killed inside the block, and found by the next process
    program = (
        "import os, signal; from diffusion2gan.runtime.files import temporary_folder\n"
        "with temporary_folder('serve'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert len(names(tmp_path)) == len(kept) + 1
    with files.temporary_folder("serve"):
        assert len(names(tmp_path)) == len(kept) + 1
    assert names(tmp_path) == sorted(kept)


def test_json_with_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    value = {"file": os.fsdecode(b"caf\xe9.png"), "prompt": "café ✓"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "✓" not in (tmp_path / "a.json").read_text()
    write_json(tmp_path / "a.json", {"prompt": "café ✓"})
    assert "✓" in (tmp_path / "a.json").read_text()


def test_pipes_and_devices_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="a device or a pipe"), atomic_write(pipe):
        pytest.fail("the block was run")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
