"""The corridor in miniature, through the command line alone: pairs → distill → export → generate → compare."""

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


def run(*argv: object) -> str:
    """`diffusion2gan ARGV…` in this process; its output."""
    out, err = io.StringIO(), io.StringIO()
    before, term = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["diffusion2gan", *map(str, argv)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as exit_,
        ):
            cli.main()
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, term)
    assert exit_.value.code == 0, (argv, err.getvalue())
    return out.getvalue()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_corridor(tiny_teacher: Path, tmp_path: Path) -> None:
    pairs, folder, student = tmp_path / "pairs", tmp_path / "run", tmp_path / "export"
    out = run(
        "pairs",
        "--teacher",
        tiny_teacher,
        "--count",
        24,
        "--shard-size",
        10,
        "--num-inference-steps",
        4,
        "--out",
        pairs,
    )
    assert "24 pairs" in out
    assert "all 24 pairs are well" in run("pairs", "verify", pairs)
    assert "made: 24 of 24 pairs, 3 of 3 shards" in run("pairs", "info", pairs)

    settings = (
        f"teacher={tiny_teacher}",
        "loss=mse",
        "total_pairs=96",
        "batch_size=16",
        "sample_every=48",
    )
    settings += (
        "ema_decay=0.5",
        "learning_rate=0.0003",
        "gan_start_pairs=32",
        "discriminator_warmup=16",
    )
    sets = [word for setting in settings for word in ("--set", setting)]
    assert "96 pairs seen" in run("distill", "pocket", "--pairs", pairs, "--out", folder, *sets)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["pairs_seen"] for entry in log] == [16, 32, 48, 64, 80, 96]
    assert np.mean([entry["loss"] for entry in log[-2:]]) < log[0]["loss"]
    for sheet in ("000000048.png", "000000096.png"):
        assert pixels(folder / "samples" / sheet).std() > 2

    run("export", folder, "--out", student)
    told = run(
        "generate",
        student,
        "--prompt",
        PROMPTS[0],
        "--per-prompt",
        2,
        "--seed",
        3,
        "--out",
        tmp_path / "g.png",
    )
    assert "1 step" in told and re.search(r"[\d.]+ seconds per picture", told)
    picture = pixels(tmp_path / "g.png")
    assert picture.shape == (64, 130, 3)
    pipeline = DiffusionPipeline.from_pretrained(student, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPTS[0],
        latents=noise_from_seeds([3], (4, 16, 16)),
        num_inference_steps=1,
        guidance_scale=0,
        output_type="np",
    ).images[0]
    assert (
        np.abs(picture[:, :64] - np.round(stock * 255)).max() <= 1
    )  # stock diffusers makes the same
    assert picture[:, :64].std() > 2 and np.abs(picture[:, :64] - picture[:, 66:]).mean() > 1

    prompts, report = tmp_path / "prompts.txt", tmp_path / "report"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    systems = ("--system", f"teacher={tiny_teacher}", "--system", f"student={student}")
    run("compare", *systems, "--prompts", prompts, "--out", report)
    page = (report / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 2 * len(PROMPTS) and not re.search(
        r"(src|href)=[\"']?https?:", page
    )
    assert PROMPTS[1] in page and "&lt;b&gt;a disc&lt;/b&gt;" in page and PROMPTS[2] not in page
    grid = pixels(report / "grid.png")
    assert grid.std() > 10 and len(np.unique(grid.reshape(-1, 3), axis=0)) > 100
    temporary = [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert not temporary


def test_the_shipped_corridor_makes_a_picture(tmp_path: Path) -> None:
    """On the embedded default: two pairs of the shipped teacher, and the shipped student's picture in one step."""
    run("pairs", "--count", 2, "--num-inference-steps", 2, "--out", tmp_path / "pairs")
    told = run(
        "generate",
        "pocket-student",
        "--prompt",
        PROMPTS[0],
        "--per-prompt",
        2,
        "--out",
        tmp_path / "g.png",
    )
    assert "1 step" in told and pixels(tmp_path / "g.png").std() > 10
    assert torch.get_default_dtype() == torch.float32
