"""Faults with tests of their own, beside the campaign's kills: each round in a new process.

    python tests/faults/others.py --rounds 5        # `make faults` does it after the campaign

Adds to docs/results/faults.json, for every fault, how often its tests ran and which of them failed.
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
# Fault → its tests: FILE::NAME, or FILE for all tests in it
OTHER_FAULTS = {
    "disk full": [
        "tests/runtime/test_files.py::test_a_full_disk_is_a_failure",
        "tests/runtime/test_files.py::test_a_full_disk_leaves_the_old_checkpoint",
    ],
    "read-only output": [
        "tests/faults/test_read_only.py::test_a_read_only_disk_is_reported",
        "tests/faults/test_read_only.py::test_a_file_in_place_of_the_output_folder_is_reported",
    ],
    "clock jumps": ["tests/faults/test_faults.py::test_a_clock_that_jumps_changes_nothing"],
    "shard truncated": ["tests/pairs/test_store.py::test_a_truncated_shard_is_a_failure"],
    "shard bit-flipped": [
        "tests/pairs/test_store.py::test_every_flipped_byte_is_detected_or_harmless"
    ],
    "shard swapped between two sets": [
        "tests/pairs/test_store.py::test_a_shard_of_another_set_is_refused"
    ],
    "shard duplicated": ["tests/pairs/test_check.py::test_a_duplicated_shard_is_reported"],
    "newest checkpoint or recipe.json missing": [
        "tests/distill/test_checkpoints.py::test_going_back_to_an_earlier_one_gives_the_same_run"
    ],
    "checkpoint damaged": [
        "tests/runtime/test_checkpoint.py::test_a_damaged_checkpoint_is_a_failure"
    ],
    "a checkpoint's part missing, cut off or damaged": [
        "tests/runtime/test_sharded_checkpoint.py::test_a_missing_altered_or_extra_shard_is_named"
    ],
    "a rank killed between two parts": [
        "tests/distill/test_fsdp.py::test_kill_between_two_shards_leaves_the_previous_checkpoint"
    ],
    "a rank that cannot write its part": [
        "tests/runtime/test_sharded_checkpoint.py::test_all_ranks_report_a_rank_that_cannot_write"
    ],
    "two processes writing one folder": [
        "tests/runtime/test_lock.py",
        "tests/distill/test_ranks.py::test_preempted_run_exits_with_0_and_a_second_process_is_refused",
        "tests/test_export.py::test_a_second_export_at_the_same_time_is_refused",
        "tests/perceptual/test_fit.py::test_two_processes_do_not_write_the_same_folder",
    ],
    "a rank that hangs": [
        "tests/distill/test_ranks.py::test_hanging_rank_is_named",
        "tests/distill/test_fsdp.py::test_hanging_rank_is_named_by_unshard",
        "tests/evaluate/test_share.py::test_a_rank_that_never_comes_is_named",
    ],
    "a rank killed under torchrun --max-restarts": [
        "tests/distill/test_ranks.py::test_run_survives_the_loss_of_a_rank"
    ],
    "NaN in one rank only": [
        "tests/distill/test_ranks.py::test_any_number_of_ranks_is_the_same_update",
        "tests/distill/test_fsdp.py::test_memory_is_shared_and_nan_on_one_rank_skips_on_all",
    ],
    "object store answers 500, or vanishes": [
        "tests/runtime/test_storage.py::test_server_errors_are_retried",
        "tests/runtime/test_storage.py::test_a_server_outage_of_ten_seconds_is_survived",
    ],
}


def run_rounds(
    rounds: int, faults: dict[str, list[str]] = OTHER_FAULTS, root: Path = ROOT
) -> dict[str, Any]:
    """For each fault: its tests, how many ran and were skipped in all rounds, and what was lost.

    Lost are tests that failed or did not run.
    """
    rows: dict[str, Any] = {}
    for fault, tests in faults.items():
        rows[fault] = {"tests": tests, "tried": 0, "skipped": 0, "lost": []}
    all_tests = sorted({test for tests in faults.values() for test in tests})

    for number in range(rounds):
        cases = run_tests(all_tests, root)
        for row in rows.values():
            for test in row["tests"]:
                count_cases(row, test, cases, number)
    return rows


def run_tests(tests: list[str], root: Path) -> list[ElementTree.Element]:
    """Runs the tests in a new process and returns the cases of pytest's report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "slow or not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=root)
        return list(ElementTree.parse(report).iter("testcase"))


def count_cases(
    row: dict[str, Any], test: str, cases: list[ElementTree.Element], number: int
) -> None:
    """Adds the cases of `test` in round `number` to the row of its fault."""
    own_cases = [case for case in cases if is_case_of(case, test)]
    if not own_cases:
        row["lost"].append(f"round {number}: {test} did not run")

    for case in own_cases:
        outcomes = {child.tag for child in case}
        if "skipped" in outcomes:
            row["skipped"] += 1
        else:
            row["tried"] += 1
        if outcomes & {"failure", "error"}:
            row["lost"].append(f"round {number}: {case.get('name')}")


def is_case_of(case: ElementTree.Element, test: str) -> bool:
    """Whether a case of pytest's report belongs to `test`."""
    file, _, name = test.partition("::")
    module = file.removesuffix(".py").replace("/", ".")
    case_name = str(case.get("name")).partition("[")[0]  # without the parameters
    return case.get("classname") == module and name in ("", case_name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    command = shlex.join(["python", "tests/faults/others.py", *sys.argv[1:]])
    result = {"command": command, "rounds": args.rounds, "faults": run_rounds(args.rounds)}
    existing: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    write_json(args.out, {**existing, "other_faults": result})
    print("lost:", sum(len(row["lost"]) for row in result["faults"].values()))
