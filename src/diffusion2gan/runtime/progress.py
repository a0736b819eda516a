"""The progress bar of every long job: count, speed, time left. Plain lines without a terminal."""

from __future__ import annotations

import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Under torchrun only rank 0 prints.
console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")


def clock(seconds: float) -> str:
    """`1:05` or `2:03:04`."""
    minutes, seconds_left = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds_left:02d}"
    return f"{minutes}:{seconds_left:02d}"


class Bar:
    """A progress bar in any unit.

    `with Bar("pairs", total=1000, done=200) as bar: bar.advance(8, "loss 0.1")`
    """

    def __init__(self, what: str, total: int, done: int = 0, plain_every_s: float = 15.0) -> None:
        self._what = what
        self._total = total
        self._done = done
        self._done_at_start = done
        self._plain_every_s = plain_every_s
        self._note = ""
        self._live = _live_progress() if console.is_terminal else None

    def __enter__(self) -> Bar:
        self._start = self._last_line = time.monotonic()
        if self._live:
            self._live.start()
            self._task = self._live.add_task(
                self._what, total=self._total, completed=self._done, note=""
            )
        return self

    def advance(self, count: int, note: str = "") -> None:
        """Adds `count` to the progress; `note` is shown until the next note."""
        self._done += count
        self._note = note or self._note
        if self._live:
            self._live.update(self._task, advance=count, note=self._note)
            return
        now = time.monotonic()
        if now - self._last_line >= self._plain_every_s or self._done >= self._total:
            self._last_line = now
            console.print(self._plain_line(), soft_wrap=True)

    def reach(self, done: int, note: str = "") -> None:
        """Advances to the total `done`. Does nothing if that is not an increase."""
        if done > self._done:
            self.advance(done - self._done, note)

    def _plain_line(self) -> str:
        # Speed and time left
        elapsed_s = time.monotonic() - self._start
        num_new = self._done - self._done_at_start
        per_s = num_new / max(elapsed_s, 1e-9)
        eta = "?"
        if per_s > 0:
            eta = clock((self._total - self._done) / per_s)

        line = f"{self._what}: {self._done}/{self._total} · {per_s:.1f}/s · ETA {eta} {self._note}"
        return line.rstrip()

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


def _live_progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
