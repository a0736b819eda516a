"""Seeds torch's global generator before every test of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def seed_global_generator() -> None:
    """No test depends on an unseeded random number, nor on which tests ran before it."""
    import torch

    torch.manual_seed(0)
