"""Numbers from environment variables."""

from __future__ import annotations

import math
import os

from diffusion2gan.errors import UserError


def env_number(name: str, default: float) -> float:
    """The value of variable `name`, or `default` if it is not set.

    Raises UserError unless it is a finite number of at least 0.
    """
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(
            f"{name}={text!r} in the environment must be a number of at least 0; unset it for "
            f"{default:g}"
        )
    return value
