"""The package's errors.

Each message is one paragraph: what is wrong, where, the values, the remedy.

`UserError` can be corrected by the user (exit code 2); `Failure` cannot (exit code 1).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# A message may quote a value, a file's name or a library's message of any length.
MAX_START, MAX_END = 1500, 700
# Characters by which a quoted name could move the cursor of a terminal, or colour it
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


class Diffusion2GANError(Exception):
    """The base of all errors that this package raises deliberately.

    Its message is made one paragraph, and shortened in the middle if it is very long.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(one_paragraph(message))


def one_paragraph(message: str) -> str:
    """A message on one line, without control characters, of at most about 2200 characters."""
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    line = CONTROL.sub("�", line)
    if len(line) <= MAX_START + MAX_END:
        return line
    return f"{line[:MAX_START]} […] {line[-MAX_END:]}"


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
