"""The progress bar in a terminal of 80 columns, its plain lines, and `--quiet`."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from diffusion2gan.runtime import progress
from diffusion2gan.runtime.progress import Bar, clock

# The longest line of a training run
NOTE = (
    "loss 0.1234 · D accuracy 75% real 63% fake · R1 1.23e+04 · 12 skipped · "
    "the discriminator is too strong · saturation drift"
)
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a terminal of this width."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, highlight=False)
    monkeypatch.setattr(progress, "console", console)
    return written


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the bars see, in a list of one number."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("width", [80, 60, 200])
def test_bar_count_pace_and_eta_stay_however_long_the_status_is(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = terminal(width, monkeypatch)
    now = fake_clock(monkeypatch)
    with Bar("distill e_latent_lpips", 60_000, 9_600) as bar:
        now[0] = 10.0
        bar.advance(1_000, NOTE)
        assert bar._live is not None
        bar._live.refresh()
    lines = [line for line in CODES.sub("", written.getvalue()).splitlines() if line.strip()]
    line, status = lines[-2:]

    assert len(line) <= width and len(status) <= width
    assert "10600/60000" in line
    assert "100.0/s" in line
    assert "ETA 8:14" in line
    assert sum(line.count(dash) for dash in "━╸╺") >= 8
    assert status.startswith("loss 0.1234 · D accuracy")
    assert ("saturation drift" in status) == (width == 200)
    assert status.rstrip().endswith("…") == (width < 200)


def test_pace_follows_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=written, width=200))
    now = fake_clock(monkeypatch)
    with Bar("pairs", 1000, plain_every_s=0.0) as bar:
        for _ in range(300):
            now[0] += 1.0
            bar.advance(1)
        for _ in range(200):
            now[0] += 4.0
            bar.advance(1)
    lines = written.getvalue().splitlines()
    assert lines[299] == "pairs: 300/1000 · 1.0/s · ETA 11:40"
    assert lines[499] == "pairs: 500/1000 · 0.2/s · ETA 33:20"


def test_a_bar_without_progress_has_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    written = terminal(80, monkeypatch)
    with Bar("pairs", 10) as bar:
        assert bar._live is not None
        bar._live.refresh()
    assert "0/10 ?/s ETA ?" in CODES.sub("", written.getvalue())


def test_quiet_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_show_progress", True)
    written = terminal(80, monkeypatch)
    progress.hide_progress()
    with Bar("pairs", 2) as bar:
        bar.advance(2, "note")
    assert written.getvalue() == ""
    progress.console.print("warning: x")
    assert "warning: x" in written.getvalue()


def test_clock() -> None:
    assert [clock(s) for s in (5, 65, 3661, -1)] == ["0:05", "1:05", "1:01:01", "0:00"]
