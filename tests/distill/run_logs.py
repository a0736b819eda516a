"""Reading a run's log and files in tests."""

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
            assert isinstance(entry.pop(key), int | float), key
        lines.append(json.dumps(entry))
    return "\n".join(lines)


def repeatable_files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by name: equal for jobs that did the same.

    Logs of runs are without what depends on the machine; the page of a run, which shows times, is
    left out.
    """
    files = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name == "log.jsonl":
            files[name] = repeatable_text(path.parent).encode()
        elif path.is_file() and path.name != "index.html":
            files[name] = path.read_bytes()
    return files
