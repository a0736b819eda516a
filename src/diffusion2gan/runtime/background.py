"""A job in a background thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs one job at a time in a thread. The next `start`, or `wait`, raises a job's exception."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._running: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Waits for the previous job, then starts this one."""
        self.wait()
        self._running = self._pool.submit(job)

    def wait(self) -> None:
        """Waits for the running job, if there is one."""
        running = self._running
        self._running = None  # an exception is raised only once
        if running is not None:
            running.result()
