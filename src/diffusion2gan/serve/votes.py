"""Blind preference: which pair a voter sees next, the votes on disk, and what they say of two systems.

A vote is one line of JSON in a file that only ever grows. A lock and one write a line let several voters, and several
processes, append at once; what was there when a machine stopped is read again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from diffusion2gan.errors import Failure, UserError

QUESTIONS = {
    "realism": "Which picture looks more realistic?",
    "alignment": "Which picture agrees better with the text?",
}
FIELDS = ("voter", "prompt_index", "prompt", "left", "right", "study", *QUESTIONS)


@dataclass(frozen=True)
class Study:
    """What is voted on: systems `a` and `b`, and a `digest` of all the pictures depend on."""

    a: str
    b: str
    digest: str


class Trial(NamedTuple):
    """One question to one voter: the prompt's index, and which system stands on which side."""

    prompt_index: int
    left: str
    right: str


def trial_order(study: Study, num_prompts: int, voter: str) -> list[Trial]:
    """A voter's trials: every prompt once, in an order and with sides that are random, and the same after a reload."""
    rng = random.Random(f"{study.digest} {voter}")
    indices = rng.sample(range(num_prompts), num_prompts)
    return [Trial(i, *rng.sample([study.a, study.b], 2)) for i in indices]


# ------------------------------------------------------------------------------------------------------------ on disk


def append_vote(path: Path, vote: Mapping[str, Any]) -> None:
    """Adds one vote and waits until it is on the disk. Raises Failure where it cannot be written."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            torn = (
                size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            )  # by a machine that stopped in the middle
            line = json.dumps({"time": time.time(), **vote}, ensure_ascii=True).encode()
            text = b"\n" * torn + line + b"\n"
            if os.write(descriptor, text) != len(text):
                raise OSError("only a part of it was written")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Failure(
            f"the vote could not be written to {path} ({error}); free some space and vote again."
        ) from error


def read_votes(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The votes of a file, and how many of its lines are none (cut off or edited). Of a voter's two votes on one
    prompt the later counts. Raises UserError where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"no votes in {path}: the file is missing; diffusion2gan serve --vote A B writes one"
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder; give the file that `diffusion2gan serve --vote` writes"
        ) from None
    parsed = [_parse(line) for line in lines if line.strip()]
    votes = {
        (v["study"]["digest"], v["voter"], v["prompt_index"]): v for v in parsed if v is not None
    }
    return list(votes.values()), parsed.count(None)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        vote = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = (
        isinstance(vote, dict)
        and all(field in vote for field in FIELDS)
        and isinstance(vote["study"], dict)
    )
    if (
        not whole
        or set(vote["study"]) != {"a", "b", "digest"}
        or not isinstance(vote["prompt_index"], int)
    ):
        return None
    words = [
        *vote["study"].values(),
        *(vote[key] for key in ("voter", "left", "right", *QUESTIONS)),
    ]
    right = all(isinstance(word, str) for word in words) and all(
        vote[q] in (vote["left"], vote["right"]) for q in QUESTIONS
    )
    return vote if right else None


def check_study(path: Path, study: Study) -> None:
    """Raises UserError where `path` already holds votes on something else."""
    for vote in read_votes(path)[0] if path.exists() else []:
        if vote["study"] != asdict(study):
            there = vote["study"]
            raise UserError(
                f"{path} holds votes on {there['a']} against {there['b']} ({there['digest']}), and this is {study.a} "
                f"against {study.b} ({study.digest}): other systems, prompts or noises. Name another file with --votes."
            )


def voted(path: Path, voter: str) -> set[int]:
    """The prompts a voter has voted on."""
    votes = read_votes(path)[0] if path.exists() else []
    return {vote["prompt_index"] for vote in votes if vote["voter"] == voter}


# --------------------------------------------------------------------------------------------------------- statistics


class Preference(NamedTuple):
    """How often `a` was preferred: `wins` of `num_votes`, the share, its interval, and the p-value of one half."""

    wins: int
    num_votes: int
    share: float
    low: float
    high: float
    p_value: float


def preference(wins: int, count: int, level: float = 0.95) -> Preference:
    """The share wins/count with Wilson's interval (Wilson 1927), and the exact binomial test against one half.

    The interval takes votes as independent. Raises UserError where there is no vote.
    """
    if count < 1 or not 0 <= wins <= count:
        raise UserError(f"{wins} of {count} votes: there is nothing to count")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = wins / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Preference(
        wins,
        count,
        share,
        max(0.0, centre - half),
        min(1.0, centre + half),
        _sign_test(wins, count),
    )


def _sign_test(wins: int, count: int) -> float:
    """P(as uneven or more) for a fair coin, two-sided, exact."""
    few = min(wins, count - wins)
    tail = sum(math.comb(count, k) for k in range(few + 1))
    return min(1.0, 2 * (tail / 2**count))


def summary(path: Path) -> list[str]:
    """Lines for the reader: per pair of systems and question the preference, the voters, and lines that are no vote."""
    votes, num_bad = read_votes(path)
    lines = [f"warning: {num_bad} lines of {path} are no votes and are left out"] if num_bad else []
    if not votes:
        raise UserError(f"no votes in {path} yet; {len(lines) and num_bad} unreadable lines")
    for study in dict.fromkeys(Study(**vote["study"]) for vote in votes):
        lines += _tell(study, [vote for vote in votes if vote["study"] == asdict(study)])
    return lines


def _tell(study: Study, votes: Sequence[Mapping[str, Any]]) -> list[str]:
    num_voters = len({vote["voter"] for vote in votes})
    num_prompts = len({vote["prompt_index"] for vote in votes})
    lines = [
        f"{study.a} against {study.b}: {len(votes)} votes, {num_voters} voters, {num_prompts} prompts"
    ]
    for question in QUESTIONS:
        p = preference(sum(vote[question] == study.a for vote in votes), len(votes))
        lines.append(
            f"  {question}: {study.a} preferred {p.share:.1%} [{p.low:.1%}, {p.high:.1%}] "
            f"({p.wins} of {p.num_votes}), p = {p.p_value:.2g} against even"
        )
    if num_prompts < len(votes):
        lines.append(
            "  the intervals take votes as independent; several on one prompt are not quite"
        )
    return lines
