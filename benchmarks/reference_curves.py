"""Draws the logged curves of a run: an example of a healthy adversarial training.

    python benchmarks/reference_curves.py runs/gan

Means over each fiftieth of the run, from its log.jsonl. Writes docs/images/reference_curves.svg
and, for the pages of other runs, the same points to src/diffusion2gan/distill/healthy_run.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import lines

NUM_POINTS = 50  # of a curve
ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "images" / "reference_curves.svg"
POINTS = ROOT / "src" / "diffusion2gan" / "distill" / "healthy_run.json"
KEYS = (
    "loss",
    "gan_loss",
    "d_loss",
    "accuracy_real",
    "accuracy_fake",
    "accuracy_mixed",
    "r1",
    "grad_norm",
    "d_grad_norm",
    "latent_shift",
    "latent_std_ratio",
)


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

    curves = {key: mean_curve(log, key) for key in KEYS}
    std_ratio = curves["latent_std_ratio"]

    losses = {
        "perceptual": curves["loss"],
        "student's adversarial": curves["gan_loss"],
        "D": curves["d_loss"],
    }
    accuracies = {
        "real": curves["accuracy_real"],
        "fake": curves["accuracy_fake"],
        "mixed": curves["accuracy_mixed"],
    }
    norms = {"student": curves["grad_norm"], "D": curves["d_grad_norm"]}
    shift = {
        "mean, of a std": curves["latent_shift"],
        "std, ratio - 1": [(pairs_seen, ratio - 1) for pairs_seen, ratio in std_ratio],
    }

    panels = [
        lines.panel("losses", losses, 0, 4),
        lines.panel("accuracy of D", accuracies, 0, 1),
        lines.panel("R1, squared norm", {"R1": curves["r1"]}, 1, 1e7, logarithmic=True),
        lines.panel("gradient norms before clipping", norms, 0.01, 1000, logarithmic=True),
        lines.panel("student's latents against the teacher's", shift, -0.2, 0.2),
    ]
    lines.draw(OUT, panels, "pairs seen")

    # One curve per line, with four digits
    points = []
    for key, curve in curves.items():
        rounded = [[pairs_seen, float(f"{value:.4g}")] for pairs_seen, value in curve]
        points.append(f"{json.dumps(key)}: {json.dumps(rounded)}")
    POINTS.write_text("{\n" + ",\n".join(points) + "\n}\n")


if __name__ == "__main__":
    main()
