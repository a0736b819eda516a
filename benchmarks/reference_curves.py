"""The curves of a run, as `distill` logged them: what a healthy adversarial training looks like.

    python benchmarks/reference_curves.py runs/gan

Means over each fiftieth of the run, from its log.jsonl. Writes docs/images/reference_curves.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import lines

PARTS = 50
OUT = Path(__file__).parent.parent / "docs" / "images" / "reference_curves.svg"


def means(log: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(pairs seen, mean) of each part of the log that has the key."""
    size = -(-len(log) // PARTS)
    parts = [log[i : i + size] for i in range(0, len(log), size)]
    values = [
        (part[-1]["pairs_seen"], [e[key] for e in part if e.get(key) is not None]) for part in parts
    ]
    return [(at, statistics.fmean(found)) for at, found in values if found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    accuracies = {kind: means(log, f"accuracy_{kind}") for kind in ("real", "fake", "mixed")}
    losses = {
        "perceptual": means(log, "loss"),
        "student's adversarial": means(log, "gan_loss"),
        "D": means(log, "d_loss"),
    }
    norms = {"student": means(log, "grad_norm"), "D": means(log, "d_grad_norm")}
    shift = {"mean, of a std": means(log, "latent_shift"), "std, ratio - 1": deviation(log)}
    panels = [
        lines.panel("losses", losses, 0, 4),
        lines.panel("share that D tells right", accuracies, 0, 1),
        lines.panel("R1, squared norm", {"R1": means(log, "r1")}, 1, 1e7, logarithmic=True),
        lines.panel("gradient norms before clipping", norms, 0.01, 1000, logarithmic=True),
        lines.panel("student's latents against the teacher's", shift, -0.2, 0.2),
    ]
    lines.draw(OUT, panels, "pairs seen")


def deviation(log: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(at, value - 1) for at, value in means(log, "latent_std_ratio")]


if __name__ == "__main__":
    main()
