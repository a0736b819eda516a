"""The package's errors.

Each message is one paragraph: what is wrong, where, the values, the remedy.

`UserError` can be corrected by the user (exit code 2); `Failure` cannot (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Diffusion2GANError(Exception):
    """The base of all errors that this package raises deliberately."""

    exit_code = 1


class UserError(Diffusion2GANError):
    """A wrong argument, setting, file or folder."""

    exit_code = 2


class Failure(Diffusion2GANError):
    """A failure during a job: a damaged file, a full disk, a diverged run."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the most similar known name; if none is similar, all of them."""
    names = sorted(known)
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if similar:
        return f"; did you mean {similar[0]!r}?"
    return f"; known: {', '.join(names)}"
