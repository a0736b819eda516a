"""Prompts from a text file, and the digest that identifies a list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from diffusion2gan.errors import UserError
from diffusion2gan.runtime.files import check_downloaded

MAX_LISTED = 5  # line numbers in a message


def split_lines(text: str) -> list[str]:
    """The lines of a text, which end with \\n, \\r\\n or \\r alone.

    `str.splitlines` also splits at characters that belong to a line, such as U+2028 and U+0085.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_lines(path: Path, what: str, remedy: str) -> list[str]:
    """The lines of a text file, one `what` ("prompt", "caption") per line, stripped.

    A byte order mark at its start is ignored. `remedy` ends the message if there is no such file.
    Raises UserError if the file is missing, empty, not UTF-8 or has blank lines.
    """
    path = path.expanduser()
    check_downloaded(path)
    try:
        lines = split_lines(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no {what}s file {path}; {remedy}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a text file with one {what} per line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None

    # Check that every line has text
    lines = [line.strip() for line in lines]
    if not any(lines):
        raise UserError(f"{path} is empty; write one {what} per line")
    blank = [number for number, line in enumerate(lines, 1) if not line]
    if blank:
        listed = ", ".join(map(str, blank[:MAX_LISTED]))
        raise UserError(
            f"{path} has {len(blank)} blank lines (line {listed}); delete them, or write the "
            f"missing {what}s there"
        )
    return lines


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one per line. Raises UserError as `read_lines` does."""
    return read_lines(
        path,
        "prompt",
        "give a text file with one prompt per line, or `pocket` for the pocket world's",
    )


def prompts_digest(prompts: Sequence[str]) -> str:
    """Identifies a list of prompts by its content, independent of the file's name."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return f"{len(prompts)} prompts, sha256 {digest[:16]}"
