"""Prompts from a text file, and the digest that names a list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from diffusion2gan.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """One prompt a line. Raises UserError where the file is missing, empty, not UTF-8 or has blank lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"no prompts file {path}; give a text file with one prompt a line, or `pocket`"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty; write one prompt a line")
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        shown = ", ".join(map(str, blank[:5]))
        raise UserError(
            f"{path} has {len(blank)} blank lines (line {shown}); delete them, or write the prompts there"
        )
    return [line.strip() for line in lines]


def prompts_digest(prompts: Sequence[str]) -> str:
    """Names a list of prompts by its content: what a set was made from, whatever the file was called."""
    return f"{len(prompts)} prompts, sha256 {hashlib.sha256(chr(10).join(prompts).encode()).hexdigest()[:16]}"
