"""The command line, stopped after a step: `stopped_distill.py PAIRS_SEEN SIGNAL ARGUMENTS…`.

Once the run is at PAIRS_SEEN, TERM sends a SIGTERM to torchrun, or to the process itself if it is
alone, and waits until it has arrived: the next step is the last one. KILL ends rank 1 of the first
attempt.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion2gan import cli
from diffusion2gan.distill import reporting
from diffusion2gan.runtime.distributed import get_ranks
from diffusion2gan.runtime.stop import StepControl

pairs_seen, number = int(sys.argv.pop(1)), sys.argv.pop(1)
stopped: Callable[[], int | None] = lambda: None  # noqa: E731
original_init = StepControl.__init__
original_log_step = reporting.log_step


def init(self: StepControl, *arguments: Any) -> None:
    global stopped
    stopped = arguments[0]
    original_init(self, *arguments)


def log_step(run: Any, entry: dict[str, Any], out: Path, seconds: float) -> dict[str, Any]:
    line = original_log_step(run, entry, out, seconds)
    ranks = get_ranks()
    if run.pairs_seen != pairs_seen:
        return line
    if number == "TERM" and ranks.is_main:
        os.kill(os.getpid() if ranks.world_size == 1 else os.getppid(), signal.SIGTERM)
        while stopped() is None:
            time.sleep(0.01)
    is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if number == "KILL" and ranks.rank == 1 and is_first_attempt:
        print("KILLED", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return line


StepControl.__init__ = init  # type: ignore[method-assign]
reporting.log_step = log_step
cli.main()
