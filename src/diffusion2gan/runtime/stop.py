"""Stopping a long job between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signal() -> Iterator[Callable[[], int | None]]:
    """Yields `stopped()`, the first signal's number once Ctrl-C or SIGTERM has come; a second Ctrl-C interrupts.

    The job asks between its steps, saves, and ends itself; a scheduler may send SIGTERM again meanwhile. Outside the
    main thread nothing changes.
    """
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
