"""The weights and pairs that are installed with the package."""

from __future__ import annotations

from pathlib import Path

from diffusion2gan.errors import Failure

# The pocket teacher's default sampling settings.
GUIDANCE_SCALE = 3.0
NUM_INFERENCE_STEPS = 50

ROOT = Path(__file__).parent / "pocket" / "weights"


def folder(name: str) -> Path:
    """The folder of weights `name`. Raises Failure if the installation lacks it."""
    path = ROOT / name
    if not path.exists():
        raise Failure(
            f"this installation has no pocket {name} ({path} is missing); install the package "
            "again."
        )
    return path


def pairs_world(seed: int) -> int:
    """The pocket world (a seed of scenes) whose captions a set of pairs with this seed uses.

    The pocket models' training and the evaluation use other worlds.
    """
    return 100 + seed
