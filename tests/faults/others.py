"""Faults that have tests of their own, beside the campaign's kills: tried some rounds, each in a fresh process.

    python tests/faults/others.py --rounds 5        # make faults does it after the campaign

Adds to docs/results/faults.json, for every fault, how often its tests ran and which failed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from diffusion2gan.runtime.files import write_json

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "results" / "faults.json"
OTHER_FAULTS = {  # FILE::NAME, or FILE for all in it
    "disk full": [
        "tests/runtime/test_files.py::test_a_full_disk_is_a_failure",
        "tests/runtime/test_files.py::test_a_full_disk_leaves_the_old_checkpoint",
    ],
    "read-only output": [
        "tests/faults/test_read_only.py::test_a_read_only_disk",
        "tests/faults/test_read_only.py::test_a_file_where_a_folder_should_be",
    ],
    "clock jumps": ["tests/faults/test_faults.py::test_a_clock_that_jumps_changes_nothing"],
    "shard truncated": ["tests/pairs/test_store.py::test_a_cut_off_shard_is_a_failure"],
    "shard bit-flipped": ["tests/pairs/test_store.py::test_no_flipped_byte_passes_unnoticed"],
    "shard swapped between two sets": [
        "tests/pairs/test_store.py::test_a_shard_of_another_set_is_refused"
    ],
    "shard duplicated": ["tests/pairs/test_check.py::test_a_duplicated_shard_is_told"],
    "newest checkpoint or recipe.json missing": [
        "tests/distill/test_checkpoints.py::test_going_back_to_an_earlier_one_gives_the_same_run"
    ],
    "checkpoint damaged": [
        "tests/runtime/test_checkpoint.py::test_a_damaged_checkpoint_is_a_failure"
    ],
    "a checkpoint's part missing, cut off or damaged": [
        "tests/runtime/test_sharded_checkpoint.py::test_a_wrong_part_is_named"
    ],
    "a rank killed between two parts": [
        "tests/distill/test_fsdp.py::test_a_kill_between_two_parts_leaves_the_checkpoint_before"
    ],
    "a rank that cannot write its part": [
        "tests/runtime/test_sharded_checkpoint.py::test_a_rank_that_cannot_write_is_told_by_all"
    ],
    "two processes writing one folder": [
        "tests/runtime/test_lock.py",
        "tests/distill/test_ranks.py::test_preemption_ends_well_and_a_second_run_is_refused",
        "tests/test_export.py::test_a_second_export_at_the_same_time_is_refused",
        "tests/perceptual/test_fit.py::test_two_processes_do_not_write_the_same_folder",
    ],
    "a rank that hangs": [
        "tests/distill/test_ranks.py::test_a_rank_that_hangs_is_named",
        "tests/distill/test_fsdp.py::test_a_rank_that_hangs_is_named_by_the_gathering",
        "tests/evaluate/test_share.py::test_a_rank_that_never_comes_is_named",
    ],
    "a rank killed under torchrun --max-restarts": [
        "tests/distill/test_ranks.py::test_the_loss_of_a_rank_is_survived"
    ],
    "NaN in one rank only": [
        "tests/distill/test_ranks.py::test_any_number_of_ranks_is_the_same_update",
        "tests/distill/test_fsdp.py::test_memory_is_shared_and_nan_on_one_rank_skips_on_all",
    ],
    "object store answers 500, or vanishes": [
        "tests/runtime/test_storage.py::test_faults_are_waited_out",
        "tests/runtime/test_storage.py::test_a_server_that_vanishes_for_ten_seconds",
    ],
}


def tried(
    rounds: int, faults: dict[str, list[str]] = OTHER_FAULTS, root: Path = ROOT
) -> dict[str, Any]:
    """By fault: its tests, how many of them ran in all rounds, how many were skipped, and which failed or never ran."""
    rows: dict[str, Any] = {
        fault: {"tests": tests, "tried": 0, "skipped": 0, "lost": []}
        for fault, tests in faults.items()
    }
    every = sorted({test for tests in faults.values() for test in tests})
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [
                "-m",
                "pytest",
                "-m",
                "slow or not slow",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
            ]
            subprocess.run([sys.executable, *command, *every], cwd=root)
            cases = list(ElementTree.parse(report).iter("testcase"))
        for row in rows.values():
            for test in row["tests"]:
                mine = [
                    (str(case.get("name")), {child.tag for child in case})
                    for case in cases
                    if is_of(case, test)
                ]
                row["skipped"] += sum("skipped" in kinds for _, kinds in mine)
                row["tried"] += sum("skipped" not in kinds for _, kinds in mine)
                failed = [name for name, kinds in mine if kinds & {"failure", "error"}]
                row["lost"] += [
                    f"round {number}: {name}"
                    for name in (failed if mine else [f"{test} did not run"])
                ]
    return rows


def is_of(case: ElementTree.Element, test: str) -> bool:
    """Whether a line of pytest's report is one of `test`."""
    file, _, name = test.partition("::")
    module = file.removesuffix(".py").replace("/", ".")
    return case.get("classname") == module and name in ("", str(case.get("name")).partition("[")[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    command = shlex.join(["python", "tests/faults/others.py", *sys.argv[1:]])
    found = {"command": command, "rounds": args.rounds, "faults": tried(args.rounds)}
    told: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_json(args.out, told | {"other_faults": found})
    print("lost:", sum(len(row["lost"]) for row in found["faults"].values()))
