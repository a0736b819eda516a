"""Reading a run's log in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusion2gan.distill.reporting import MACHINE_KEYS


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; none if it has no log yet."""
    path = out / "log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def repeatable_text(out: Path) -> str:
    """The log without what depends on the machine: equal text is the same log, bit for bit.

    Every line must have the keys that are left out, and these must be numbers.
    """
    lines = []
    for entry in read_log(out):
        for key in MACHINE_KEYS:
            assert entry.pop(key) > 0, key
        lines.append(json.dumps(entry))
    return "\n".join(lines)
