"""Flipped bytes in tensors, everywhere that weights or cached tensors are read from."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.perceptual.distance import LatentLPIPS
from diffusion2gan.perceptual.vgg import VGG
from diffusion2gan.runtime import cache, checkpoint, files, integrity
from diffusion2gan.teacher.conditioning import Conditioning
from diffusion2gan.teacher.prompt_cache import PromptCache

NUM_FLIPS = 40


def flips(path: Path, seed: int, only_tensors: bool = True) -> Iterator[int]:
    """Flips a bit at NUM_FLIPS places in turn; yields the position, then restores the file."""
    intact = path.read_bytes()
    start = 8 + int.from_bytes(intact[:8], "little") if only_tensors else 0
    generator = random.Random(seed)
    for _ in range(NUM_FLIPS):
        position = generator.randrange(start, len(intact))
        changed = bytearray(intact)
        changed[position] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        yield position
    path.write_bytes(intact)


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weights": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "images": torch.randint(0, 256, (2, 4, 4, 3), generator=generator, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "step": torch.tensor(3.0),
        "none": torch.zeros(0, 3),
    }


def write_checkpoint(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "checkpoint.safetensors"
    checkpoint.save(path, some_tensors(), {"pairs_seen": 12, "note": "ü", "loss": 0.1})
    return path, lambda: checkpoint.load(path)


def write_cached_images(folder: Path) -> tuple[Path, Callable[[], object]]:
    """As `evaluate`, `compare` and `serve --vote` keep their images, and `evaluate` features."""
    path = folder / "000000-2.safetensors"

    def read() -> dict[str, Tensor]:
        images = {"pictures": some_tensors()["images"]}
        return cache.load_or_compute(path, {"prompts": ["a", "b"]}, lambda: images)

    read()
    return path, read


def write_cache(folder: Path) -> tuple[Path, Callable[[], object]]:
    """As `perceptual fit` keeps the latents of its images."""

    def read() -> cache.Cache:
        rows = some_tensors()["weights"]
        return cache.make_cache(
            folder, {"size": 1}, 5, lambda i: {"x": rows[i]}, lambda batch: batch, "rows", chunk=2
        )

    read()
    return folder / "00000002.safetensors", read


def write_perceptual_network(folder: Path) -> tuple[Path, Callable[[], object]]:
    LatentLPIPS(VGG(4, (2, 2, 2, 2, 2)), [torch.rand(2) for _ in range(5)]).save_pretrained(folder)
    return folder / "model.safetensors", lambda: LatentLPIPS.from_pretrained(folder)


def write_prompts(folder: Path) -> tuple[Path, Callable[[], object]]:
    prompts = ["a", "b", "c"]

    def encode(texts: list[str]) -> Conditioning:
        numbers = torch.tensor([float(ord(text)) for text in texts])
        return Conditioning(numbers[:, None, None].expand(-1, 2, 3).sin(), numbers[:, None].cos())

    store = PromptCache(folder, prompts, encode)
    assert torch.allclose(store.read(["b"]).prompt_embeds, encode(["b"]).prompt_embeds, atol=1e-3)
    (path,) = folder.glob("*.safetensors")
    return path, lambda: PromptCache(folder, prompts, encode).read(prompts)


KINDS = (
    write_checkpoint,
    write_cached_images,
    write_cache,
    write_perceptual_network,
    write_prompts,
)


@pytest.mark.parametrize("write", KINDS)
def test_flipped_bits_in_tensors_are_noticed(
    write: Callable[[Path], tuple[Path, Callable[[], object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, read = write(tmp_path)
    read()
    for _ in flips(path, seed=0):
        with pytest.raises(Failure, match=rf"{re.escape(str(path))} is damaged .*sha256"):
            read()
    read()

    # Without checks, and a file without digests
    next(flips(path, seed=0))
    monkeypatch.setenv(integrity.VARIABLE, "0")
    read()
    monkeypatch.delenv(integrity.VARIABLE)
    with pytest.raises(Failure, match="is damaged"):
        read()
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["meta"])
    header.pop(checkpoint.DIGESTS)
    header.pop("prompts_sha256", None)
    save_file(load_file(path), path, {"meta": json.dumps(header)})
    read()


def test_flipped_bits_in_the_header_are_noticed_or_harmless(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path)
    tensors, meta = checkpoint.load(path)
    num_refused = 0
    content = path.read_bytes()
    for position in range(8 + int.from_bytes(content[:8], "little")):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        try:
            found, found_meta = checkpoint.load(path)
        except (Failure, UserError):
            num_refused += 1
            continue
        # What is left are spaces, and the names of the digests, without which none is checked
        assert found.keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(found[key], value), position
        assert found_meta == {} or meta.items() <= found_meta.items()
    assert num_refused > 0.8 * position


def test_the_same_state_gives_the_same_file(tmp_path: Path) -> None:
    """Which safetensors does not promise for a header of several entries."""
    contents = set()
    for number in range(4):
        path, _ = write_checkpoint(tmp_path / str(number))
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_header_alone_is_checked_without_reading_tensors(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path)
    content = path.read_bytes()
    assert content.count(b"12") == 1
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.meta(path)["pairs_seen"] == 12
    path.write_bytes(content.replace(b"12", b"13"))
    with pytest.raises(Failure, match=r"is damaged.*header"):
        checkpoint.meta(path)


def test_tensor_digest_covers_names_types_and_shapes() -> None:
    zeros = torch.zeros(2, 3)
    digests = [
        integrity.hash_tensors({"a": zeros}),
        integrity.hash_tensors({"b": zeros}),
        integrity.hash_tensors({"a": zeros.T}),
        integrity.hash_tensors({"a": zeros.int()}),
        integrity.hash_tensors({"a": zeros, "b": zeros}),
        integrity.hash_tensors({}),
    ]
    assert len(set(digests)) == len(digests)
    assert integrity.hash_tensors({"b": zeros, "a": zeros}) == digests[4]
    assert integrity.hash_tensors({"a": torch.zeros(3, 2).T}) == digests[0]


# ---------------------------------------------------------------------------- power loss


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files and folders that are flushed, renamed to, in order; no hidden ones."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        if not Path(target).name.startswith("."):
            calls.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_contents_are_flushed_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    calls = recorded_calls(monkeypatch)
    checkpoint.save(folder / "checkpoint.safetensors", {"a": torch.ones(3)}, {})
    names = ["flush checkpoint.safetensors", "rename checkpoint.safetensors", "flush run"]
    assert calls == names

    # A folder: every file and every folder in it
    calls.clear()
    with files.atomic_write(folder / "export") as temporary:
        (temporary / "unet").mkdir(parents=True)
        (temporary / "unet" / "weights").write_bytes(b"1")
        (temporary / "README.md").write_text("2")
    assert sorted(calls[:-2]) == [
        "flush README.md",
        "flush export",
        "flush unet",
        "flush weights",
    ]
    assert calls[-2:] == ["rename export", "flush run"]

    # Files on which nothing relies
    calls.clear()
    with files.atomic_write(folder / "image.png", flush_to_disk=False) as temporary:
        temporary.write_bytes(b"3")
    assert calls == ["rename image.png"]


def test_disk_that_cannot_flush_a_folder_is_accepted_and_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    folder_error = errno.EINVAL
    file_error = 0

    def failing_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        number = folder_error if is_folder else file_error
        if number:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    files.write_json(tmp_path / "a.json", 1)
    assert files.read_json(tmp_path / "a.json") == 1

    file_error = errno.ENOSPC
    with pytest.raises(Failure, match="the disk is full"):
        files.write_json(tmp_path / "a.json", 2)
    file_error = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        files.write_json(tmp_path / "a.json", 2)
    assert files.read_json(tmp_path / "a.json") == 1
    assert os.listdir(tmp_path) == ["a.json"]


# ------------------------------------------------------- errors of the machine, not of the file


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(24, "Too many open files"), r"cannot be read \(Too many open files\)"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"),
        (PermissionError(13, "Permission denied"), r"cannot be read \(Permission denied\)"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory",
        ),
        (RuntimeError("mmap failed: Cannot allocate memory (os error 12)"), "not enough memory"),
    ],
)
def test_errors_of_the_machine_are_distinguished_from_damage(
    error: Exception, message: str
) -> None:
    failure = files.translate_error("weights", error)
    assert failure is not None
    with pytest.raises(Failure, match=f"{message}.*may be intact"):
        raise failure


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file"),
        ValueError("damaged"),
        OSError("no number"),
        OSError(22, "Invalid argument"),
    ],
)
def test_other_errors_are_not_the_machines(error: Exception) -> None:
    assert files.translate_error("weights", error) is None


def test_checkpoint_with_too_many_open_files_is_not_reported_as_damaged(tmp_path: Path) -> None:
    path, read = write_checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(Failure, match=r"cannot be read \(Too many open files\).*intact"):
            read()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.isclose(float(checkpoint.load(path)[0]["step"]), 3.0)
