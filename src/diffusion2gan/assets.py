"""Where the shipped weights lie."""

from __future__ import annotations

from pathlib import Path

from diffusion2gan.errors import Failure

GUIDANCE_SCALE = 3.0  # the pocket teacher's
NUM_INFERENCE_STEPS = 50
ROOT = Path(__file__).parent / "pocket" / "weights"


def folder(name: str) -> Path:
    """`weights/<name>` inside the package. Raises Failure where the installation lacks it."""
    path = ROOT / name
    if not path.exists():
        raise Failure(
            f"this installation has no pocket {name} ({path} is missing); install the package again."
        )
    return path


def pairs_world(seed: int) -> int:
    """The world whose captions a set of pairs with this seed uses: never one that is trained or measured on."""
    return 100 + seed
