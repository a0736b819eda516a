"""Saved images: on disk with their prompt and seed, newest first."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

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
