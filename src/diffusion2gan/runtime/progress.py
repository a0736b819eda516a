"""The progress bar of every long job: count, pace, time left. Plain lines without a terminal."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

PACE_ADVANCES = 100  # the pace is measured over so many advances, so that it follows a change

# Under torchrun only rank 0 prints.
console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
_show_progress = True


def hide_progress() -> None:
    """No bar and no plain lines from now on (`--quiet`); warnings are still printed."""
    global _show_progress
    _show_progress = False


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
        self._plain_every_s = plain_every_s
        self._note = ""
        self._history: deque[tuple[float, int]] = deque(maxlen=PACE_ADVANCES)
        self._live = LiveBar(console) if _show_progress and console.is_terminal else None

    def __enter__(self) -> Bar:
        self._last_line = time.monotonic()
        self._history.append((self._last_line, self._done))
        if self._live:
            self._live.start()
            pace, eta = self._pace_and_eta()
            self._task = self._live.add_task(
                self._what, total=self._total, completed=self._done, note="", pace=pace, eta=eta
            )
        return self

    def advance(self, count: int, note: str = "") -> None:
        """Adds `count` to the progress; `note` is shown until the next note."""
        self._done += count
        self._note = note or self._note
        now = time.monotonic()
        self._history.append((now, self._done))
        if self._live:
            pace, eta = self._pace_and_eta()
            self._live.update(self._task, advance=count, note=self._note, pace=pace, eta=eta)
            return
        if now - self._last_line >= self._plain_every_s or self._done >= self._total:
            self._last_line = now
            if _show_progress:
                console.print(self._plain_line(), soft_wrap=True)

    def reach(self, done: int, note: str = "") -> None:
        """Advances to the total `done`. Does nothing if that is not an increase."""
        if done > self._done:
            self.advance(done - self._done, note)

    def _pace_and_eta(self) -> tuple[str, str]:
        """The pace of the last advances, and the time left at that pace; "?" before the first."""
        first_s, first_done = self._history[0]
        last_s, last_done = self._history[-1]
        if last_done == first_done:
            return "?/s", "ETA ?"
        per_s = (last_done - first_done) / max(last_s - first_s, 1e-9)
        return f"{per_s:.1f}/s", f"ETA {clock((self._total - self._done) / per_s)}"

    def _plain_line(self) -> str:
        pace, eta = self._pace_and_eta()
        return f"{self._what}: {self._done}/{self._total} · {pace} · {eta} {self._note}".rstrip()

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()


class LiveBar(Progress):
    """The bar in a terminal: bar, count, pace and time left on one line, the note on the next.

    However long the note is, it takes nothing from the bar: it is cut at the terminal's width.
    """

    def __init__(self, on: Console) -> None:
        name = Column(no_wrap=True, overflow="ellipsis")
        number = Column(no_wrap=True, justify="right")
        super().__init__(
            TextColumn("{task.description}", table_column=name),
            BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=number),
            TextColumn("{task.fields[pace]}", table_column=number.copy()),
            TextColumn("{task.fields[eta]}", table_column=number.copy()),
            console=on,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(task.fields["note"], style="dim", no_wrap=True, overflow="ellipsis")
