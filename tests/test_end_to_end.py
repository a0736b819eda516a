"""All jobs in miniature, by command line: pairs → distill → export → generate → compare."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusion2gan import cli
from diffusion2gan.noise import noise_from_seeds

PROMPTS = ["a red ring", "a blue star above a plain green moon on pink", "<b>a disc</b>"]
RECIPE = [
    "loss=mse",
    "total_pairs=96",
    "batch_size=16",
    "sample_every=48",
    "ema_decay=0.5",
    "learning_rate=0.0003",
    "gan_start_pairs=32",
    "discriminator_warmup=16",
]


def run(*argv: object) -> str:
    """Runs `diffusion2gan ARGV…` in this process; returns its standard output."""
    out, err = io.StringIO(), io.StringIO()
    argv_before = sys.argv
    sigterm_before = signal.getsignal(signal.SIGTERM)
    sys.argv = ["diffusion2gan", *map(str, argv)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as exit_,
        ):
            cli.main()
    finally:
        sys.argv = argv_before
        signal.signal(signal.SIGTERM, sigterm_before)
    assert exit_.value.code == 0, (argv, err.getvalue())
    return out.getvalue()


def read_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_tiny_teacher_becomes_a_student_and_a_report(tiny_teacher: Path, tmp_path: Path) -> None:
    pairs, folder, student = tmp_path / "pairs", tmp_path / "run", tmp_path / "export"

    # Pairs
    options = ["--prompts", "pocket", "--count", 24, "--shard-size", 10]
    options += ["--num-inference-steps", 4]
    out = run("pairs", "--teacher", tiny_teacher, *options, "--out", pairs)
    assert "24 pairs" in out
    assert "all 24 pairs are valid" in run("pairs", "verify", pairs)
    assert "made: 24 of 24 pairs, 3 of 3 shards" in run("pairs", "info", pairs)

    # Distill
    argv: list[object] = ["distill", "pocket", "--pairs", pairs, "--out", folder]
    for setting in [f"teacher={tiny_teacher}", *RECIPE]:
        argv += ["--set", setting]
    assert "96 pairs seen" in run(*argv)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["pairs_seen"] for entry in log] == [16, 32, 48, 64, 80, 96]
    assert np.mean([entry["loss"] for entry in log[-2:]]) < log[0]["loss"]
    for sheet in ("000000048.png", "000000096.png"):
        assert read_pixels(folder / "samples" / sheet).std() > 2

    # Export and generate: two different images side by side
    run("export", folder, "--out", student)
    image_file = tmp_path / "g.png"
    options = ["--prompt", PROMPTS[0], "--per-prompt", 2, "--seed", 3]
    out = run("generate", student, *options, "--out", image_file)
    assert "1 step" in out
    assert re.search(r"[\d.]+ seconds per image", out)
    sheet_pixels = read_pixels(image_file)
    assert sheet_pixels.shape == (64, 130, 3)
    first, second = sheet_pixels[:, :64], sheet_pixels[:, 66:]
    assert first.std() > 2
    assert np.abs(first - second).mean() > 1

    # Stock diffusers generates the same image from the exported folder
    pipeline = DiffusionPipeline.from_pretrained(student, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (stock,) = pipeline(
        PROMPTS[0],
        latents=noise_from_seeds([3], (4, 16, 16)),
        num_inference_steps=1,
        guidance_scale=0,
        output_type="np",
    ).images
    assert np.abs(first - np.round(stock * 255)).max() <= 1

    # Compare: the page embeds all images, loads nothing, and escapes the prompts
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    systems = ["--system", f"teacher={tiny_teacher}", "--system", f"student={student}"]
    run("compare", *systems, "--prompts", prompts, "--out", report)
    page = (report / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 2 * len(PROMPTS)
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    assert PROMPTS[1] in page
    assert "&lt;b&gt;a disc&lt;/b&gt;" in page
    assert PROMPTS[2] not in page
    grid = read_pixels(report / "grid.png")
    assert grid.std() > 10
    assert len(np.unique(grid.reshape(-1, 3), axis=0)) > 100

    # No temporary files are left
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old"))]


def test_the_shipped_teacher_makes_pairs_and_the_shipped_student_an_image(tmp_path: Path) -> None:
    run("pairs", "--count", 2, "--num-inference-steps", 2, "--out", tmp_path / "pairs")

    options = ["--prompt", PROMPTS[0], "--per-prompt", 2, "--out", tmp_path / "g.png"]
    out = run("generate", "pocket-student", *options)
    assert "1 step" in out
    assert read_pixels(tmp_path / "g.png").std() > 10
    assert torch.get_default_dtype() == torch.float32
