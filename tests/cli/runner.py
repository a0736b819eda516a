"""Runs `diffusion2gan` commands inside the test process, through the console script's `main`."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from typing import NamedTuple

from diffusion2gan import cli


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*argv: object) -> Result:
    """Runs `diffusion2gan ARGV…` and returns its exit code and output."""
    out, err = io.StringIO(), io.StringIO()
    code = 0

    # main() reads sys.argv and installs a SIGTERM handler: restore both afterwards.
    previous_argv = sys.argv
    previous_handler = signal.getsignal(signal.SIGTERM)
    sys.argv = ["diffusion2gan", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.argv = previous_argv
        signal.signal(signal.SIGTERM, previous_handler)
    return Result(code, out.getvalue(), err.getvalue())


def assert_refused(result: Result, code: int, *phrases: str) -> None:
    """Checks for exit code `code`, no traceback, and one error paragraph with all `phrases`."""
    assert result.code == code, result
    assert "Traceback" not in result.err + result.out

    errors = re.split(r"^error: ", result.err, flags=re.IGNORECASE | re.MULTILINE)
    assert len(errors) == 2, result.err
    paragraph = errors[1].strip()
    assert "\n\n" not in paragraph and 10 < len(paragraph) < 1200

    words = " ".join(paragraph.split())
    for phrase in phrases:
        assert phrase in words, (phrase, paragraph)
