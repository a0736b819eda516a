"""Image files: the size is looked at in the header first, and only known formats are read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli.runner import assert_refused, run
from PIL import Image, ImageFile

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.images import read_image
from diffusion2gan.pipelines.image_folder import open_images
from diffusion2gan.pipelines.image_folder import read_image as read_reference
from diffusion2gan.runtime.cache import Unreadable
from diffusion2gan.runtime.images import (
    FORMATS,
    MAX_GENERATED_PIXELS,
    MAX_PIXELS,
    BadImage,
    open_image,
    read_rgb,
)
from diffusion2gan.serve.history import load_history


def save_black(path: Path, width: int, height: int) -> Path:
    """A black PNG of one bit per pixel: 13000² of them are 20 KiB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the pixels of any image fails the test."""

    def load(self: object) -> None:
        pytest.fail("the pixels were read")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


@pytest.mark.parametrize(
    ("width", "height", "limit", "reason"),
    [
        (13000, 13000, MAX_PIXELS, r"13000×13000 pixels, and at most 67108864 .*8192×8192"),
        (20000, 20000, MAX_PIXELS, r"DecompressionBombError"),
        (4097, 4096, MAX_GENERATED_PIXELS, r"4097×4096 pixels, and at most 16777216 .*4096×4096"),
        (1, 60000, MAX_PIXELS, r"1×60000 pixels, and one side may be at most 100 times"),
    ],
)
def test_images_that_are_too_large_are_refused_by_their_header(
    width: int, height: int, limit: int, reason: str, tmp_path: Path, no_pixels: None
) -> None:
    path = save_black(tmp_path / "large.png", width, height)
    assert path.stat().st_size < 100_000
    with pytest.raises(BadImage, match=reason):
        read_rgb(path, limit)


def test_the_largest_allowed_sizes_are_read(tmp_path: Path) -> None:
    assert read_rgb(save_black(tmp_path / "long.png", 600, 6)).size == (600, 6)
    image = read_rgb(save_black(tmp_path / "wide.png", 4096, 4096), MAX_GENERATED_PIXELS)
    assert image.size == (4096, 4096)


@pytest.mark.parametrize("name", [name.lower() for name in FORMATS])
def test_known_formats_are_read(name: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 6, 3), np.uint8)
    path = tmp_path / "image"
    Image.fromarray(pixels).save(path, format=name)
    with Image.open(path) as image:
        expected = image.convert("RGB")
    assert read_rgb(path).tobytes() == expected.tobytes()


def test_other_formats_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(BadImage, match="UnidentifiedImageError"):
        read_rgb(path)
    with pytest.raises(BadImage, match="FileNotFoundError"):
        read_rgb(tmp_path / "none.png")

    content = save_black(path, 64, 64).read_bytes()
    for length in range(len(content) - 24):  # before the end of the pixels
        path.write_bytes(content[:length])
        with pytest.raises(BadImage):
            read_rgb(path)


def test_every_reader_looks_at_the_size_first(tmp_path: Path, no_pixels: None) -> None:
    path = save_black(tmp_path / "0.png", 13000, 13000)
    with pytest.raises(UserError, match=r"0\.png cannot be read as an image .*13000×13000"):
        open_images("folder", tmp_path).check([0])
    with pytest.raises(UserError, match=r"0\.png .*13000×13000"):
        next(open_images("folder", tmp_path).read([0]))
    with pytest.raises(UserError, match=r"0\.png .*13000×13000"):
        read_reference(path)
    for source in (path, path.read_bytes()):
        with pytest.raises(Unreadable, match=r"first .*13000×13000"):
            read_image(source, "first", 64)
    assert load_history(tmp_path, 4) == []


def evaluate(folder: Path, out: Path) -> list[object]:
    return ["evaluate", folder, "--count", 4, "--out", out / "metrics.json"]


def compare(folder: Path, out: Path) -> list[object]:
    prompts = out.with_name("prompts.txt")
    prompts.write_text("a star\na ring\na star\na ring\n")
    return ["compare", "--system", f"x={folder}", "--prompts", prompts, "--out", out]


@pytest.mark.parametrize("command", [evaluate, compare])
def test_commands_name_the_limit(
    command: Callable[[Path, Path], list[object]], tmp_path: Path, no_pixels: None
) -> None:
    """The last image is too large: it is refused before the first one is read."""
    for number in range(3):
        save_black(tmp_path / "images" / f"{number}.png", 64, 64)
    save_black(tmp_path / "images" / "3.png", 13000, 13000)
    found = run(*command(tmp_path / "images", tmp_path / "out"))
    assert_refused(found, 2, "3.png", "13000×13000", "16777216")
    assert not (tmp_path / "out").exists()


def test_open_image_reports_an_error_of_its_block(tmp_path: Path) -> None:
    path = save_black(tmp_path / "image.png", 8, 8)
    with pytest.raises(BadImage, match="ValueError: no"), open_image(path):
        raise ValueError("no")
