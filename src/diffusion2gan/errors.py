"""Deliberate errors. Each message says what was wrong, where, both values and the remedy, in one paragraph.

`UserError` is the user's to mend (exit code 2); `Failure` is not (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Diffusion2GANError(Exception):
    """Base of everything this package raises on purpose."""

    exit_code = 1


class UserError(Diffusion2GANError):
    """A wrong argument, setting, file or folder."""

    exit_code = 2


class Failure(Diffusion2GANError):
    """Something went wrong on the way: a damaged file, a full disk, a diverged run."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or the list of them where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
