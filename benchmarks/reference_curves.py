"""Draws the logged curves of a run: an example of a healthy adversarial training.

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

NUM_POINTS = 50  # of a curve
OUT = Path(__file__).parent.parent / "docs" / "images" / "reference_curves.svg"


Curve = list[tuple[float, float]]


def mean_curve(log: list[dict[str, Any]], key: str) -> Curve:
    """(pairs seen, mean) of each section of the log that has the key."""
    size = -(-len(log) // NUM_POINTS)  # rounded up
    curve = []
    for start in range(0, len(log), size):
        section = log[start : start + size]
        values = [entry[key] for entry in section if entry.get(key) is not None]
        if values:
            curve.append((section[-1]["pairs_seen"], statistics.fmean(values)))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    lines_of_log = (args.run / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines_of_log]

    losses = {
        "perceptual": mean_curve(log, "loss"),
        "student's adversarial": mean_curve(log, "gan_loss"),
        "D": mean_curve(log, "d_loss"),
    }
    accuracies = {
        "real": mean_curve(log, "accuracy_real"),
        "fake": mean_curve(log, "accuracy_fake"),
        "mixed": mean_curve(log, "accuracy_mixed"),
    }
    penalty = {"R1": mean_curve(log, "r1")}
    norms = {"student": mean_curve(log, "grad_norm"), "D": mean_curve(log, "d_grad_norm")}
    std_ratio = mean_curve(log, "latent_std_ratio")
    shift = {
        "mean, of a std": mean_curve(log, "latent_shift"),
        "std, ratio - 1": [(pairs_seen, ratio - 1) for pairs_seen, ratio in std_ratio],
    }

    panels = [
        lines.panel("losses", losses, 0, 4),
        lines.panel("accuracy of D", accuracies, 0, 1),
        lines.panel("R1, squared norm", penalty, 1, 1e7, logarithmic=True),
        lines.panel("gradient norms before clipping", norms, 0.01, 1000, logarithmic=True),
        lines.panel("student's latents against the teacher's", shift, -0.2, 0.2),
    ]
    lines.draw(OUT, panels, "pairs seen")


if __name__ == "__main__":
    main()
