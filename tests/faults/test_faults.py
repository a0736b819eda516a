"""A short fault campaign: nothing is lost. The long one: `make faults`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")


@pytest.mark.slow
def test_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    subprocess.run([sys.executable, str(CAMPAIGN), "--rounds", "3", "--out", str(out), "--seed", "7"], check=True)
    told = json.loads(out.read_text())
    assert told["lost"] == 0, told
    rows = told["sigkill"]
    assert len(rows) == 6 and all(row["rounds"] == 3 for row in rows.values())
    assert sum(row["killed_before_the_end"] for row in rows.values()) >= 9
