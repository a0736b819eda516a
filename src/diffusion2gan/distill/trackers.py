"""Experiment trackers: TensorBoard, Weights & Biases, trackio. Each is a function that starts it.

All of them receive the numbers of each line of log.jsonl, over the pairs seen.
"""

from __future__ import annotations

import hashlib
import importlib
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from diffusion2gan.errors import UserError, nearest
from diffusion2gan.runtime.progress import console

PROJECT = "diffusion2gan"


@dataclass(frozen=True)
class Tracker:
    """A started tracker: `log(numbers, pairs seen)` and `close()`."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def start_trackers(
    names: Sequence[str], out: Path, settings: Mapping[str, Any], pairs_seen: int
) -> list[Tracker]:
    """Starts trackers for the run in `out`, which is at `pairs_seen` pairs.

    `settings` are the run's. Raises UserError as `check_trackers` does.
    """
    check_trackers(names)
    return [TRACKERS[name](out, settings, pairs_seen) for name in dict.fromkeys(names)]


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError if a name is unknown or its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--tracker: no tracker is called {name!r}{nearest(name, TRACKERS)}")
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise UserError(
                f"--tracker {name} needs the package {name}, which is not installed ({error}): "
                f"pip install 'diffusion2gan[{name}]'"
            ) from error


def numbers_of_line(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of log.jsonl; those of a list get its key and their position."""
    numbers: dict[str, float] = {}
    for key, value in line.items():
        values = {key: value}
        if isinstance(value, list):
            values = {f"{key}/{i}": item for i, item in enumerate(value)}
        for name, item in values.items():
            if isinstance(item, float | int):
                numbers[name] = item
    return numbers


def start_tensorboard(out: Path, settings: Mapping[str, Any], pairs_seen: int) -> Tracker:
    """Event files in `out/tensorboard`: `tensorboard --logdir runs` shows them.

    The points of steps that a resumed run repeats are removed.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=pairs_seen + 1)
    table = "\n".join(["| setting | value |", "|---|---|", *_table_rows(settings)])
    writer.add_text("settings", table, pairs_seen)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def start_wandb(out: Path, settings: Mapping[str, Any], pairs_seen: int) -> Tracker:
    """A Weights & Biases run, with its files in `out/wandb`; resumed with the run in `out`.

    WANDB_MODE and the other variables of wandb apply. Without a key on this machine the run is
    offline, and no key is asked for; `wandb sync` uploads it.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not has_wandb_key():
        mode = "offline"
        console.print(
            f"wandb has no key on this machine, so the run is logged offline; to upload it: "
            f"wandb sync {out}/wandb/offline-run-*",
            soft_wrap=True,
        )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=out.resolve().name,
        id=run_id(out),
        resume="allow",
        dir=str(out),
        config=dict(settings),
        mode=mode,  # type: ignore[arg-type, unused-ignore]
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="pairs_seen")

    def log(numbers: dict[str, float], step: int) -> None:
        run.log({**numbers, "pairs_seen": step})

    return Tracker(log, run.finish)


def start_trackio(out: Path, settings: Mapping[str, Any], pairs_seen: int) -> Tracker:
    """A trackio run on this machine; resumed with the run in `out`. `trackio show` shows it."""
    import trackio

    trackio.init(
        project=PROJECT, name=run_id(out), config=dict(settings), resume="allow", embed=False
    )

    def log(numbers: dict[str, float], step: int) -> None:
        trackio.log(numbers, step=step)

    return Tracker(log, trackio.finish)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": start_tensorboard,
    "wandb": start_wandb,
    "trackio": start_trackio,
}
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def run_id(out: Path) -> str:
    """Identifies the run in the folder `out`, so that it is found again when it is resumed."""
    path = out.resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def has_wandb_key() -> bool:
    """Whether wandb finds a key without asking: in its variable, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _table_rows(settings: Mapping[str, Any]) -> list[str]:
    return [f"| {key} | {value} |" for key, value in settings.items()]
