"""Which of several processes this one is: what torchrun says in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes, the `local` one of this machine. Alone: 0 of 1."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0


def ranks() -> Ranks:
    """What torchrun (RANK, WORLD_SIZE, LOCAL_RANK) made of this process."""
    env = os.environ
    return Ranks(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))


def own_device(name: str) -> str:
    """`cuda` under torchrun is this rank's own GPU; every other name stays."""
    here = ranks()
    return f"cuda:{here.local}" if name == "cuda" and here.world > 1 else name
