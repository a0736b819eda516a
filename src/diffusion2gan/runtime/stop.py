"""Stops a long job between two steps, and decides when a training loop saves or stops."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffusion2gan.runtime.distributed import Flags
from diffusion2gan.runtime.progress import console


@contextmanager
def stop_signal() -> Iterator[Callable[[], int | None]]:
    """Yields `stopped()`: the number of the first Ctrl-C or SIGTERM received, or None.

    The job polls it between its steps, saves, and exits by itself. A second Ctrl-C interrupts at
    once; a second SIGTERM does not, because a scheduler may repeat it. Outside the main thread no
    handler is installed and `stopped()` is always None.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        if number == signal.SIGINT and not received:
            console.print("stopping after this step (Ctrl-C again stops at once) …")
        received.append(number)

    def first_received() -> int | None:
        return received[0] if received else None

    # Signal handlers can be installed in the main thread only
    if threading.current_thread() is not threading.main_thread():
        yield first_received
        return

    # Install the handlers for the duration of the block
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield first_received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StepControl:
    """When a training loop writes a checkpoint or stops. All ranks must agree, once per step.

    `request()` returns this rank's requests; `Group.sum` combines those of all ranks. A stop
    is requested by any rank that received a signal, a checkpoint by the main rank alone, after
    `checkpoint_every_s` seconds.
    """

    def __init__(
        self, stopped: Callable[[], int | None], is_main: bool, checkpoint_every_s: float
    ) -> None:
        self._stopped = stopped
        self._is_main = is_main
        self._checkpoint_every_s = checkpoint_every_s
        self._last_checkpoint = time.monotonic()

    def request(self) -> Flags:
        overdue = time.monotonic() - self._last_checkpoint > self._checkpoint_every_s
        return Flags(stop=self._stopped() is not None, save=self._is_main and overdue)

    def checkpoint_written(self) -> None:
        self._last_checkpoint = time.monotonic()
