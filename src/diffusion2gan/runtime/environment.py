"""Numbers that the environment sets."""

from __future__ import annotations

import math
import os

from diffusion2gan.errors import UserError


def env_number(name: str, default: float) -> float:
    """The variable's value, `default` where it is not set. Raises UserError where it is no number of 0 or more."""
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(
            f"{name}={text!r} in the environment is no number of 0 or more; unset it for {default:g}"
        )
    return value
