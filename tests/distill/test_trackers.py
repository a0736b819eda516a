"""The trackers, with the real packages where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_pocket
from distill.run_logs import read_log

from diffusion2gan.distill import trackers
from diffusion2gan.distill.train import distill
from diffusion2gan.errors import UserError
from diffusion2gan.pairs.make import PairsSettings, build_spec, make_pairs
from diffusion2gan.recipe import Recipe
from diffusion2gan.teacher.loading import load_teacher

BATCH = 2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    loaded = load_teacher(str(tiny_pocket.save(folder / "teacher")))
    spec = build_spec(loaded, ["a star"], PairsSettings(count=4, num_inference_steps=1))
    make_pairs(loaded, ["a star"], spec, folder / "pairs")
    return folder


def train(folder: Path, out: Path, names: list[str], total_pairs: int = 8) -> list[dict[str, Any]]:
    """Trains a run that logs to these trackers; returns its log."""
    recipe = Recipe(
        teacher=str(folder / "teacher"),
        loss="mse",
        total_pairs=total_pairs,
        batch_size=BATCH,
        adversarial_weight=0,
        mix_share=0,
    )
    distill(recipe, folder / "pairs", out, trackers=names)
    return read_log(out)


def test_tensorboard_has_every_number_of_the_log(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(pairs, tmp_path / "run", ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for key in ("loss", "grad_norm", "learning_rate", "pairs_per_s"):
        points = events.Scalars(key)
        assert [point.step for point in points] == [line["pairs_seen"] for line in lines]
        assert [point.value for point in points] == pytest.approx([line[key] for line in lines])
    assert "settings/text_summary" in events.Tags()["tensors"]


def test_wandb_without_a_key_is_offline_and_asks_for_none(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    train(pairs, tmp_path / "run", ["wandb"])
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    assert trackers.run_id(tmp_path / "run") in file.name

    # Its records are protobuf messages, with every number as JSON
    records = file.read_bytes()
    for line in read_log(tmp_path / "run"):
        assert json.dumps(line["loss"]).encode() in records
    printed = capsys.readouterr()
    assert "wandb sync" in printed.out + printed.err


def test_wandb_mode_is_honoured(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(pairs, tmp_path / "run", ["wandb"])
    assert not list((tmp_path / "run").glob("wandb/*run-*"))


def test_trackio_has_the_run(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    # In a process of its own: trackio reads its folder when it is imported
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from distill.test_trackers import train
train(Path({str(pairs)!r}), Path({str(tmp_path / "run")!r}), ["trackio"])
import json, sqlite3
(database,) = Path({str(tmp_path / "trackio")!r}).glob("*.db")
rows = sqlite3.connect(database).execute("select step, metrics from metrics order by step")
print("ROWS", json.dumps([[step, json.loads(metrics)["loss"]] for step, metrics in rows]))
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.partition("ROWS ")[2])
    expected = [[line["pairs_seen"], line["loss"]] for line in read_log(tmp_path / "run")]
    assert rows == expected


def test_numbers_of_a_line() -> None:
    line = {"pairs_seen": 4, "loss": 0.5, "r1": None, "logits_real": [1.0, 2.0], "warnings": ["x"]}
    assert trackers.numbers_of_line(line) == {
        "pairs_seen": 4,
        "loss": 0.5,
        "logits_real/0": 1.0,
        "logits_real/1": 2.0,
    }


def test_missing_package_names_its_extra_and_nothing_is_written(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"--tracker wandb needs.*pip install 'diffusion2gan\[wandb\]'"
    ):
        train(pairs, tmp_path / "run", ["wandb"])
    assert not (tmp_path / "run").exists()


def test_unknown_tracker_is_refused(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tracker is called 'tensorbord'; did you mean 'tens"):
        train(pairs, tmp_path / "run", ["tensorbord"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("netrc", "variables", "expected"),
    [
        ("", {}, False),
        ("machine api.wandb.ai login user password x", {}, True),
        ("machine other.example login user password x", {}, False),
        ("", {"WANDB_API_KEY": "x"}, True),
        (
            "machine wandb.example login user password x",
            {"WANDB_BASE_URL": "https://wandb.example"},
            True,
        ),
    ],
)
def test_key_of_wandb_is_found_where_wandb_looks(
    netrc: str,
    variables: dict[str, str],
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "netrc"
    file.write_text(netrc)
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert trackers.has_wandb_key() is expected
