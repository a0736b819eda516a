"""Saved images: on disk with their prompt and seed, newest first."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion2gan.serve.history import load_history, save_image


def test_saved_images_are_loaded_newest_first_with_their_captions(tmp_path: Path) -> None:
    for i in range(3):
        metadata = {"prompt": f"<b>{i}</b> 🦊" + "x" * 100, "seed": i, "system": "s"}
        path = save_image(tmp_path, Image.new("RGB", (8, 8), (i, 0, 0)), metadata)
        with Image.open(path) as file:
            assert json.loads(file.info["diffusion2gan"]) == metadata

    history = load_history(tmp_path, 10)
    assert [image.getpixel((0, 0)) for image, _ in history] == [(2, 0, 0), (1, 0, 0), (0, 0, 0)]
    newest_caption = history[0][1]
    assert newest_caption.startswith("<b>2</b> 🦊xx")
    assert newest_caption.endswith("… · seed 2 · s")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_other_files_and_a_missing_folder_are_tolerated(tmp_path: Path) -> None:
    assert load_history(tmp_path / "none", 4) == []

    save_image(tmp_path, Image.new("RGB", (8, 8), (1, 0, 0)), {"prompt": "a", "seed": 1})
    (tmp_path / "9.png").write_bytes(b"not an image")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "0.png")  # without metadata

    history = load_history(tmp_path, 10)
    assert [image.getpixel((0, 0)) for image, _ in history] == [(1, 0, 0), (9, 9, 9)]
    # Of the two newest files, one is not an image
    assert len(load_history(tmp_path, 2)) == 1


def write_png(path: Path, metadata: str, size: tuple[int, int] = (8, 8)) -> None:
    info = PngInfo()
    info.add_itxt("diffusion2gan", metadata, zip=True)
    Image.new("L", size).save(path, pnginfo=info)


@pytest.mark.parametrize(
    "metadata",
    [
        '{"prompt": "' + "x" * 500_000 + '", "seed": "' + "9" * 500_000 + '"}',
        '{"prompt": "a\\nb\\u0000", "seed": [[[1]]], "system": {"a": "\\n"}}',
        '{"prompt": "\\ud800", "seed": "\\udfff", "system": "\\ud800"}',
        '{"seed": ' + "1" * 5000 + "}",
        "[" * 100_000,
        "[1]",
        "null",
        "NaN",
        "",
        "x" * 2**21,  # more than Pillow decompresses
    ],
)
def test_crafted_metadata_gives_a_short_caption_or_none(metadata: str, tmp_path: Path) -> None:
    save_image(tmp_path, Image.new("RGB", (8, 8)), {"prompt": "good", "seed": 1})
    write_png(tmp_path / "9.png", metadata)
    captions = [caption for _, caption in load_history(tmp_path, 10)]
    assert "good · seed 1" in captions and len(captions) <= 2
    for caption in captions:
        assert len(caption) < 300 and "\n" not in caption
        caption.encode()  # as it is sent


def test_images_of_absurd_sizes_are_skipped_before_their_pixels_are_read(tmp_path: Path) -> None:
    write_png(tmp_path / "1.png", "{}", (20_000, 1))
    content = bytearray((tmp_path / "1.png").read_bytes())
    width = content.index(b"IHDR") + 4
    content[width : width + 8] = (10**6).to_bytes(4, "big") * 2
    content[width + 13 : width + 17] = zlib.crc32(content[width - 4 : width + 13]).to_bytes(
        4, "big"
    )
    (tmp_path / "2.png").write_bytes(content)
    write_png(tmp_path / "3.png", "{}", (4096, 64))
    assert [image.size for image, _ in load_history(tmp_path, 10)] == [(4096, 64)]
