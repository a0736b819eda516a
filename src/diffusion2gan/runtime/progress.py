"""One progress bar for every long job: count, pace, time left. Plain lines where there is no terminal."""

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

console = Console(
    stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0"
)  # of several, one speaks


def clock(seconds: float) -> str:
    minutes, seconds_left = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


class Bar:
    """`with Bar("pairs", total=1000, done=200) as bar: bar.advance(8, "loss .1")`. Units are the caller's."""

    def __init__(self, what: str, total: int, done: int = 0, plain_every_s: float = 15.0) -> None:
        self._what, self._total, self._done, self._first = what, total, done, done
        self._plain_every_s = plain_every_s
        self._note = ""
        self._live = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Bar:
        self._start = self._last = time.monotonic()
        if self._live:
            self._live.start()
            self._task = self._live.add_task(
                self._what, total=self._total, completed=self._done, note=""
            )
        return self

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        self._note = note or self._note
        if self._live:
            self._live.update(self._task, advance=count, note=self._note)
        elif time.monotonic() - self._last >= self._plain_every_s or self._done >= self._total:
            self._last = time.monotonic()
            console.print(self._line(), soft_wrap=True)

    def reach(self, done: int, note: str = "") -> None:
        """As `advance`, told how many there are in all."""
        if done > self._done:
            self.advance(done - self._done, note)

    def _line(self) -> str:
        elapsed = time.monotonic() - self._start
        pace = (self._done - self._first) / max(elapsed, 1e-9)
        left = clock((self._total - self._done) / pace) if pace > 0 else "?"
        return f"{self._what}: {self._done}/{self._total} · {pace:.1f}/s · ETA {left} {self._note}".rstrip()

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
