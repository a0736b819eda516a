"""Check that a refactoring changes no result: the same short run in two checkouts, bit for bit.

    python benchmarks/same_behaviour.py --old ../old-checkout --renamed total_pairs=pairs_seen

The run covers pair generation, regression, the discriminator with R1 and mix-and-match on two
processes, a stop by SIGTERM, an exact resume, export and generation. `--renamed NEW=OLD` names
settings that the old checkout calls differently. Writes docs/results/same_behaviour.json; exits
with 1 if any file differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from diffusion2gan.distill.reporting import MACHINE_KEYS

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "same_behaviour.json"

STEPS_BEFORE_STOP = 14
PAIRS = ["--count", "256", "--seed", "3", "--num-inference-steps", "10", "--shard-size", "64"]
SETTINGS = {
    "total_pairs": "512",
    "batch_size": "16",
    "gradient_accumulation_steps": "2",
    "gan_start_pairs": "128",
    "discriminator_warmup": "64",
    "r1_every": "4",
    "r1_weight": "1e-6",
    "mix_share": "0.25",
    "sample_every": "256",
}
PROMPTS = ["a blue star on sand", "a large red ring on pink"]
COMPARED = (
    "pairs/*.parquet",
    "run/log.jsonl",
    "run/samples/*.png",
    "export/unet/*.safetensors",
    "image.png",
)


# Keys of log.jsonl that earlier checkouts do not have, or that no two runs have in common
IGNORED_LOG_KEYS = (*MACHINE_KEYS, "learning_rate", "d_learning_rate")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--renamed", nargs="*", default=[], metavar="NEW=OLD")
    args = parser.parse_args()
    renamed = dict(pair.split("=") for pair in args.renamed)

    with tempfile.TemporaryDirectory() as scratch:
        new = run_everything(ROOT, Path(scratch) / "new", {})
        old = run_everything(args.old.resolve(), Path(scratch) / "old", renamed)

    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    for name in sorted(new):
        print(f"{'DIFFERENT' if name in different else 'same     '}  {name}")

    command = ["python", "benchmarks/same_behaviour.py", "--old", "OLD", "--renamed", *args.renamed]
    result = {
        "command": shlex.join(command),
        "old_commit": commit_of(args.old),
        "files": len(new),
        "different": different,
        "sha256": new,
    }
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if different else 0)


def run_everything(checkout: Path, folder: Path, renamed: Mapping[str, str]) -> dict[str, str]:
    """Run every job, with distill stopped and resumed; return the SHA-256 of each result."""
    folder.mkdir(parents=True)
    run_command(checkout, folder, ["pairs", *PAIRS, *solver_option(checkout), "--out", "pairs"])

    # Training on two processes: stopped after some steps, then resumed by the same command.
    distill = ["distill", "pocket", "--pairs", "pairs", "--out", "run"]
    for name, value in SETTINGS.items():
        distill += ["--set", f"{renamed.get(name, name)}={value}"]
    stop_after(checkout, folder, distill, STEPS_BEFORE_STOP)
    run_command(checkout, folder, distill, num_processes=2)

    run_command(checkout, folder, ["export", "run", "--out", "export"])
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    run_command(checkout, folder, ["generate", "export", *prompts, "--out", "image.png"])

    paths = [path for pattern in COMPARED for path in sorted(folder.glob(pattern))]
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


def solver_option(checkout: Path) -> list[str]:
    """DDIM, which older checkouts use without an option."""
    command = command_line(["pairs", "--help"], num_processes=1)
    help_text = subprocess.run(
        command, env=environment(checkout), capture_output=True, text=True, check=True
    ).stdout
    return ["--solver", "ddim"] if "--solver" in help_text else []


def command_line(words: Sequence[str], num_processes: int) -> list[str]:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_processes),
    ]
    return [sys.executable, *(launcher if num_processes > 1 else []), "-m", "diffusion2gan", *words]


def environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}


def run_command(checkout: Path, folder: Path, words: Sequence[str], num_processes: int = 1) -> None:
    subprocess.run(
        command_line(words, num_processes), cwd=folder, env=environment(checkout), check=True
    )


def stop_after(checkout: Path, folder: Path, words: Sequence[str], num_steps: int) -> None:
    """Start training on two processes and send SIGTERM once `num_steps` steps are logged."""
    process = subprocess.Popen(command_line(words, 2), cwd=folder, env=environment(checkout))
    log = folder / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < num_steps:
        if process.poll() is not None:
            raise SystemExit("training ended before it could be stopped")
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait()


def sha256(path: Path) -> str:
    """Of a file's bytes; of a Parquet file's columns alone, since its header may gain fields.

    Of a log, without IGNORED_LOG_KEYS.
    """
    if path.name == "log.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for key in IGNORED_LOG_KEYS:
                line.pop(key, None)
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    if path.suffix != ".parquet":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for name, values in sorted(pq.read_table(path).to_pydict().items()):
        digest.update(f"{name}: {values!r}".encode())
    return digest.hexdigest()


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
