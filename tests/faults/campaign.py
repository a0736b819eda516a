"""The fault campaign: every long job is killed at random moments, then run again to its end.

    python tests/faults/campaign.py --rounds 100        # or: make faults

A round starts the command (in a fork, or in two as ranks 0 and 1), kills it with SIGKILL after a
random time within the duration of a complete run, and runs the same command again to its end. The
results are compared with those of an uninterrupted run.

Writes docs/results/faults.json: rounds, kills that came before the end, and what was lost (files
that differ, the largest difference of a loss, temporary files left behind). Other faults have tests
of their own: see `others.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, tests/ is not importable
import tiny_pocket
from distill.run_logs import read_log, repeatable_files
from evaluate.machine_keys import MACHINE_KEYS

from diffusion2gan import cli, generate
from diffusion2gan.distill import train
from diffusion2gan.evaluate import images, run
from diffusion2gan.export import export
from diffusion2gan.pairs import check, store
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import write_json
from diffusion2gan.teacher.loading import load_teacher

# Loaded before the forks, which then start at once
LOADED = (cli, train, run, export, check, generate)
# Images per file of the cache, in the forks: two files of eight captions, one for each of two ranks
IMAGES_PER_FILE = 4
OUT = Path(__file__).parents[2] / "docs" / "results" / "faults.json"


@dataclass
class Job:
    """A command that writes a folder, on `ranks` ranks.

    `differs(reference, found)` lists what is not the same in two folders.
    """

    name: str
    argv: Callable[[Path], list[object]]
    differs: Callable[[Path, Path], list[str]]
    ranks: int = 1
    row: dict[str, Any] = field(
        default_factory=lambda: {"rounds": 0, "killed_before_the_end": 0, "lost": []}
    )


def start(job: Job, folder: Path) -> list[int]:
    """Forks the job's ranks and returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(job, folder, rank, port) for rank in range(job.ranks)]


def fork(job: Job, folder: Path, rank: int, port: int) -> int:
    """Runs one rank of the job in a fork, its errors in `FOLDER.log`; returns the process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid != 0:
        return pid

    code = 1
    try:
        if job.ranks > 1:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(job.ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        log = folder.with_name(f"{folder.name}.log")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.argv = ["diffusion2gan", *map(str, job.argv(folder))]
        torch.set_num_threads(1)
        images.CHUNK = IMAGES_PER_FILE
        cli.main()
        code = 0
    except SystemExit as end:
        if end.code is None:
            code = 0
        elif isinstance(end.code, int):
            code = end.code
    finally:
        os._exit(code)


def wait(pids: list[int]) -> list[int]:
    """Waits for the processes and returns their exit codes, negative for signals."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def run_to_end(job: Job, folder: Path) -> float:
    """Runs the job to its end and returns the seconds. Raises RuntimeError if it fails."""
    start_s = time.monotonic()
    codes = wait(start(job, folder))
    if any(codes):
        log = folder.with_name(f"{folder.name}.log").read_text()
        raise RuntimeError(f"{job.name}: exit codes {codes}\n{log}")
    return time.monotonic() - start_s


def run_and_kill(job: Job, folder: Path, after_s: float) -> bool:
    """Sends SIGKILL to all ranks after `after_s`; returns whether it came before their end."""
    pids = start(job, folder)
    time.sleep(after_s)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return any(code == -signal.SIGKILL for code in wait(pids))


def campaign(job: Job, base: Path, rounds: int, rng: random.Random) -> None:
    """`rounds` times: one kill at a random moment, then a run to the end."""
    reference = base / "reference"
    duration_s = run_to_end(job, reference)

    for number in range(rounds):
        folder = base / f"round{number}"
        job.row["rounds"] += 1
        job.row["killed_before_the_end"] += run_and_kill(job, folder, rng.uniform(0, duration_s))
        run_to_end(job, folder)

        # What differs, and temporary files in the folder and beside it
        lost = job.differs(reference, folder)
        hidden = [*folder.rglob(".*"), *base.glob(f".{folder.name}.*")]
        lost += [f"left: {path.name}" for path in hidden]
        job.row["lost"] += [f"round {number}: {loss}" for loss in lost]
        shutil.rmtree(folder, ignore_errors=True)

    print(job.name, {**job.row, "whole_run_s": round(duration_s, 2)}, flush=True)


def different_files(reference: Path, found: Path) -> list[str]:
    """Files whose bytes differ, or that only one folder has; as `repeatable_files` reads them."""
    expected, actual = repeatable_files(reference), repeatable_files(found)
    names = sorted({*expected, *actual})
    return [f"{name} differs" for name in names if expected.get(name) != actual.get(name)]


def different_losses(reference: Path, found: Path) -> list[str]:
    """Steps that differ, or losses or averaged weights that differ by more than 1e-6."""
    expected, actual = read_log(reference), read_log(found)
    if [entry["pairs_seen"] for entry in expected] != [entry["pairs_seen"] for entry in actual]:
        return ["log.jsonl has other steps"]
    loss_error = 0.0
    for a, b in zip(expected, actual, strict=True):
        loss_error = max(loss_error, abs(a["loss"] - b["loss"]) / a["loss"])

    expected_weights, _ = checkpoint.load(reference / "checkpoint.safetensors")
    actual_weights, _ = checkpoint.load(found / "checkpoint.safetensors")
    weight_error = 0.0
    for key, weights in expected_weights.items():
        if key.startswith("ema/"):
            error = float((weights - actual_weights[key]).abs().max())
            weight_error = max(weight_error, error)

    if max(loss_error, weight_error) > 1e-6:
        return [f"losses by {loss_error:.1e}, weights by {weight_error:.1e}"]
    return []


def different_metrics(reference: Path, found: Path) -> list[str]:
    expected = json.loads((reference / "metrics.json").read_text())
    actual = json.loads((found / "metrics.json").read_text())
    compared = [key for key in expected if key not in MACHINE_KEYS]
    return [f"{key} differs" for key in compared if not is_close(expected[key], actual.get(key))]


def is_close(a: Any, b: Any) -> bool:
    """Equal up to rounding: features of the same images differ slightly between processes."""
    if isinstance(a, dict):
        same_keys = isinstance(b, dict) and a.keys() == b.keys()
        return same_keys and all(is_close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        same_length = isinstance(b, list) and len(a) == len(b)
        return same_length and all(is_close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 * max(1.0, abs(a))
    return bool(a == b)


def build_jobs(base: Path, teacher: Path) -> list[Job]:
    """All jobs. `distill` and `export` read the pairs and the run that `prepare` makes."""
    pairs, run = base / "pairs", base / "run"
    pairs_options = (
        *("--num-inference-steps", 2, "--guidance-scale", 1),
        *("--shard-size", 4, "--batch-size", 2),
    )
    settings = {
        "teacher": teacher,
        "loss": "mse",
        "total_pairs": 32,
        "batch_size": 4,
        "checkpoint_every_s": 1e-9,
        "sample_every": 16,
        "adversarial_weight": 0.5,
        "discriminator": "patch",
        "discriminator_warmup": 8,
        "r1_every": 3,
        "keep_checkpoints": 3,
        "keep_best": "true",
    }
    set_options = []
    for key, value in settings.items():
        set_options += ["--set", f"{key}={value}"]
    one_step = (teacher, "--num-inference-steps", 1, "--guidance-scale", 0)

    def make_pairs(out: Path) -> list[object]:
        more = ("--prompts", "pocket", *pairs_options)
        return ["pairs", "--teacher", teacher, "--count", 24, *more, "--out", out]

    def distill(out: Path) -> list[object]:
        return ["distill", "pocket-regression", "--pairs", pairs, "--out", out, *set_options]

    def distill_sharded(out: Path) -> list[object]:
        return [*distill(out), "--set", "strategy=fsdp"]

    def export_run(out: Path) -> list[object]:
        return ["export", run, "--out", out]

    def evaluate(out: Path) -> list[object]:
        cache = base / f"cache-{out.parent.name}-{out.name}"
        options = ("--count", 8, "--num-resamples", 5)
        return [
            *("evaluate", *one_step, *options),
            *("--out", out / "metrics.json", "--cache", cache),
        ]

    def generate_grid(out: Path) -> list[object]:
        prompts = []
        for number in range(6):
            prompts += ["--prompt", f"a star {number}"]
        return ["generate", *one_step, *prompts, "--out", out / "grid.png"]

    return [
        Job("pairs", make_pairs, different_files),
        Job("pairs, two ranks", make_pairs, different_files, 2),
        Job("distill", distill, different_files),
        Job("distill, two ranks", distill, different_losses, 2),
        Job("distill, two ranks, fsdp", distill_sharded, different_losses, 2),
        Job("export", export_run, different_files),
        Job("evaluate", evaluate, different_metrics),
        Job("evaluate, two ranks", evaluate, different_metrics, 2),
        Job("generate, two ranks", generate_grid, different_files, 2),
    ]


def main(rounds: int, out: Path, seed: int, note: str, only: list[str]) -> dict[str, Any]:
    """Runs the campaign and writes its JSON after each job. Rows of jobs not in `only` stay."""
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"sigkill": {}}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        teacher = base / "teacher"
        tiny_pocket.save(teacher)
        load_teacher(str(teacher))  # loads, before the forks, what that imports

        jobs = build_jobs(base, teacher)
        for number, job in enumerate(jobs):
            if only and job.name not in only:
                continue
            prepare(job, base, jobs)
            folder = base / f"job{number}"
            folder.mkdir()
            campaign(job, folder, rounds, random.Random(seed + number))

            result["sigkill"][job.name] = job.row
            result["command"] = shlex.join(["python", "tests/faults/campaign.py", *sys.argv[1:]])
            result["lost"] = sum(len(row["lost"]) for row in result["sigkill"].values())
            result["seed"] = seed
            result["pairs_format"] = store.PairsSpec.format
            result["note"] = note
            write_json(out, result)
    return result


def prepare(job: Job, base: Path, jobs: list[Job]) -> None:
    """Makes the pairs and the run that a job reads, if they do not exist yet."""
    by_name = {job.name: job for job in jobs}
    if job.name.startswith(("distill", "export")) and not (base / "pairs").exists():
        run_to_end(by_name["pairs"], base / "pairs")
    if job.name == "export" and not (base / "run").exists():
        run_to_end(by_name["distill"], base / "run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="")
    parser.add_argument("--only", action="append", default=[], help="a job's name; repeatable")
    args = parser.parse_args()
    print("lost:", main(args.rounds, args.out, args.seed, args.note, args.only)["lost"])
