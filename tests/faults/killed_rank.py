"""The command line, one rank of which is killed: `killed_rank.py RANK RENAMES ARGUMENTS…`.

In the first attempt RANK is killed in place of its RENAMES-th renaming of a file: what it has
written is still temporary.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from diffusion2gan import cli
from diffusion2gan.evaluate import images
from diffusion2gan.runtime import trainer

rank, renames_left = sys.argv.pop(1), int(sys.argv.pop(1))
is_victim = os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    global renames_left
    if event == "os.rename":
        renames_left -= 1
        if renames_left == 0:
            print("KILLED before", arguments[1], file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


if is_victim:
    sys.addaudithook(watch)
# Several chunks of images, for all ranks; a checkpoint after every step
images.CHUNK = 4
trainer.CHECKPOINT_EVERY_S = 0.0
cli.main()
