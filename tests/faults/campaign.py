"""The fault campaign: every long job killed at random moments, then run again to its end; what came out is compared.

    python tests/faults/campaign.py --rounds 100        # or: make faults

A round starts the command (in a fork, or two as ranks 0 and 1 of a run), kills it with SIGKILL after a random time
within one whole run's, and runs the same command again to its end. Writes docs/results/faults.json: rounds, kills that
hit before the end, and what was lost: files that differ, largest difference of a loss, temporaries left. Other
faults have tests of their own: `others.py`.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # it runs as a script: tests/ is not there yet
import tiny_pocket

from diffusion2gan import cli, generate
from diffusion2gan.distill import train
from diffusion2gan.evaluate import pictures, run
from diffusion2gan.export import export
from diffusion2gan.pairs import check, store
from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.files import sha256, write_json
from diffusion2gan.teacher.loading import load_teacher

TIMED = {"seconds_per_image", "seconds_per_image_p90", "images_per_second", "peak_memory_bytes"}
LOADED = (cli, train, run, export, check, generate)  # before the forks, which then start at once
pictures.CHUNK = 4  # so that two ranks have something to share of eight captions
OUT = Path(__file__).parents[2] / "docs" / "results" / "faults.json"


@dataclass
class Job:
    """A command into a folder, by so many ranks; `differs(reference, found)` says what is not the same."""

    name: str
    argv: Callable[[Path], list[object]]
    differs: Callable[[Path, Path], list[str]]
    ranks: int = 1
    row: dict[str, Any] = field(
        default_factory=lambda: {"rounds": 0, "killed_before_the_end": 0, "lost": []}
    )


def start(job: Job, folder: Path) -> list[int]:
    """Forks the job's ranks; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(job, folder, rank, port) for rank in range(job.ranks)]


def fork(job: Job, folder: Path, rank: int, port: int) -> int:
    sys.stdout.flush()
    if (pid := os.fork()) != 0:
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
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(
            os.open(folder.with_name(f"{folder.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            2,
        )
        sys.argv = ["diffusion2gan", *map(str, job.argv(folder))]
        torch.set_num_threads(1)
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        os._exit(code)


def ended(pids: list[int]) -> list[int]:
    """Waits; the exit codes, negative for signals."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def whole(job: Job, folder: Path) -> float:
    """Runs the job to its end; seconds. Raises where it fails."""
    begun = time.monotonic()
    codes = ended(start(job, folder))
    if any(codes):
        raise RuntimeError(
            f"{job.name}: exit codes {codes}\n{folder.with_name(f'{folder.name}.log').read_text()}"
        )
    return time.monotonic() - begun


def killed(job: Job, folder: Path, after_s: float) -> bool:
    """SIGKILL to all ranks after so many seconds; whether it came before the end."""
    pids = start(job, folder)
    time.sleep(after_s)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return any(code == -signal.SIGKILL for code in ended(pids))


def campaign(job: Job, base: Path, rounds: int, chance: random.Random) -> None:
    """`rounds` times: one kill at a random moment, then to the end."""
    took_s = whole(job, base / "reference")
    for number in range(rounds):
        folder = base / f"round{number}"
        job.row["rounds"] += 1
        job.row["killed_before_the_end"] += killed(job, folder, chance.uniform(0, took_s))
        whole(job, folder)
        lost = job.differs(base / "reference", folder)
        lost += [
            f"left: {path.name}"
            for path in folder.parent.rglob(".*")
            if str(path).startswith(str(folder))
        ]
        lost += [f"left: {path.name}" for path in base.glob(f".{folder.name}.*")]
        job.row["lost"] += [f"round {number}: {told}" for told in lost]
        shutil.rmtree(folder, ignore_errors=True)
    print(job.name, {**job.row, "whole_run_s": round(took_s, 2)}, flush=True)


def other_files(reference: Path, found: Path) -> list[str]:
    """Names of files whose bytes differ, or that only one has."""
    a, b = (
        {path.relative_to(f): sha256(path) for path in f.rglob("*") if path.is_file()}
        for f in (reference, found)
    )
    return [f"{name} differs" for name in sorted({*a, *b}, key=str) if a.get(name) != b.get(name)]


def other_losses(reference: Path, found: Path) -> list[str]:
    """Steps that differ, losses or averaged weights further than 1e-6."""
    a, b = (
        [json.loads(x) for x in (f / "log.jsonl").read_text().splitlines()]
        for f in (reference, found)
    )
    if [x["pairs_seen"] for x in a] != [x["pairs_seen"] for x in b]:
        return ["log.jsonl has other steps"]
    furthest = max(abs(x["loss"] - y["loss"]) / x["loss"] for x, y in zip(a, b, strict=True))
    (x, _), (y, _) = (checkpoint.load(f / "checkpoint.safetensors") for f in (reference, found))
    weights = max(float((x[key] - y[key]).abs().max()) for key in x if key.startswith("ema/"))
    return (
        [f"losses by {furthest:.1e}, weights by {weights:.1e}"]
        if max(furthest, weights) > 1e-6
        else []
    )


def other_metrics(reference: Path, found: Path) -> list[str]:
    a, b = (json.loads((f / "metrics.json").read_text()) for f in (reference, found))
    return [f"{key} differs" for key in a if key not in TIMED and not close(a[key], b.get(key))]


def close(a: Any, b: Any) -> bool:
    """To rounding: two processes' float32 features of the same pictures differ in the last bits."""
    if isinstance(a, list | dict):
        places = a if isinstance(a, dict) else range(len(a))
        return (
            isinstance(b, type(a)) and len(a) == len(b) and all(close(a[i], b[i]) for i in places)
        )
    return (
        abs(a - b) <= 1e-6 * max(1.0, abs(a))
        if isinstance(a, float) and isinstance(b, float)
        else bool(a == b)
    )


def jobs(base: Path, teacher: Path) -> list[Job]:
    pairs, run = base / "pairs", base / "run"
    more = ("--num-inference-steps", 2, "--guidance-scale", 1, "--shard-size", 4, "--batch-size", 2)
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
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    def make(out: Path) -> list[object]:
        return ["pairs", "--teacher", teacher, "--count", 24, *more, "--out", out]

    def fit(out: Path) -> list[object]:
        return ["distill", "pocket-regression", "--pairs", pairs, "--out", out, *sets]

    def cut(out: Path) -> list[object]:
        return [*fit(out), "--set", "strategy=fsdp"]

    one_step = (teacher, "--num-inference-steps", 1, "--guidance-scale", 0)

    def tell(out: Path) -> list[object]:
        cache = base / f"cache-{out.parent.name}-{out.name}"
        more = ("--count", 8, "--num-resamples", 5, "--out", out / "metrics.json", "--cache", cache)
        return ["evaluate", *one_step, *more]

    def draw(out: Path) -> list[object]:
        prompts = [word for number in range(6) for word in ("--prompt", f"a star {number}")]
        return ["generate", *one_step, *prompts, "--out", out / "grid.png"]

    return [
        Job("pairs", make, other_files),
        Job("pairs, two ranks", make, other_files, 2),
        Job("distill", fit, other_files),
        Job("distill, two ranks", fit, other_losses, 2),
        Job("distill, two ranks, fsdp", cut, other_losses, 2),
        Job("export", lambda out: ["export", run, "--out", out], other_files),
        Job("evaluate", tell, other_metrics),
        Job("evaluate, two ranks", tell, other_metrics, 2),
        Job("generate, two ranks", draw, other_files, 2),
    ]


def main(rounds: int, out: Path, seed: int, note: str, only: list[str]) -> dict[str, Any]:
    """The campaign's JSON, written after each job; rows of jobs that are not chosen stay."""
    told: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"sigkill": {}}
    with tempfile.TemporaryDirectory() as name:
        base, teacher = Path(name), Path(name) / "teacher"
        tiny_pocket.save(teacher)
        load_teacher(str(teacher))  # what that imports, the forks then have
        every = jobs(base, teacher)
        for number, job in enumerate(every):
            if only and job.name not in only:
                continue
            prepare(job, base, every)
            place = base / f"job{number}"
            place.mkdir()
            campaign(job, place, rounds, random.Random(seed + number))
            told["sigkill"][job.name] = job.row
            lost = sum(len(row["lost"]) for row in told["sigkill"].values())
            told |= {
                "command": shlex.join(["python", "tests/faults/campaign.py", *sys.argv[1:]]),
                "lost": lost,
                "seed": seed,
                "pairs_format": store.PairsSpec.format,
                "note": note,
            }
            write_json(out, told)
    return told


def prepare(job: Job, base: Path, every: list[Job]) -> None:
    """What a job reads, made by the jobs before it."""
    made_by = (
        (
            "pairs",
            "pairs",
            tuple(job.name for job in every if job.name.startswith(("distill", "export"))),
        ),
        ("distill", "run", ("export",)),
    )
    for needed, name, users in made_by:
        if job.name in users and not (base / name).exists():
            whole(next(other for other in every if other.name == needed), base / name)


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
