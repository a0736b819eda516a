"""Blind preference votes: the order of the pairs, the votes on disk, and their statistics.

A vote is one line of JSON, appended to a file. A lock, and a single write per line, allow several
voters and several processes to append at the same time. Votes written before a crash remain
readable.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from diffusion2gan.errors import Failure, UserError

QUESTIONS = {
    "realism": "Which image looks more realistic?",
    "alignment": "Which image matches the text better?",
}
# Some hundred voters at once; a file of a hundred thousand votes.
MAX_VOTES_PER_MINUTE = 600
MAX_FILE_BYTES = 2**26
FIELDS = ("voter", "prompt_index", "prompt", "left", "right", "study", *QUESTIONS)


@dataclass(frozen=True)
class Study:
    """The systems `a` and `b` to vote on, and a digest of all settings of their images."""

    a: str
    b: str
    digest: str


class Trial(NamedTuple):
    """A pair of images for one voter: the index of its prompt, and the system on each side."""

    prompt_index: int
    left: str
    right: str


def trial_order(study: Study, num_prompts: int, voter: str) -> list[Trial]:
    """The trials of a voter: every prompt once, in random order and with random sides.

    The order depends only on the study and the voter, so that it is the same after a reload.
    """
    rng = random.Random(f"{study.digest} {voter}")
    indices = rng.sample(range(num_prompts), num_prompts)
    return [Trial(index, *rng.sample([study.a, study.b], 2)) for index in indices]


def is_voter(value: Any) -> bool:
    """Whether this is a voter's identifier, as `new_voter` makes them."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def new_voter() -> str:
    """A random identifier: 16 hex digits."""
    return secrets.token_hex(8)


class VoteLimit:
    """How many votes are accepted per minute, of all voters together."""

    def __init__(self, per_minute: int = MAX_VOTES_PER_MINUTE) -> None:
        self._per_minute = per_minute
        self._times: deque[float] = deque()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Counts a vote. Raises UserError if there were too many in the last minute."""
        with self._lock:
            now = time.monotonic()
            while self._times and now - self._times[0] > 60:
                self._times.popleft()
            if len(self._times) >= self._per_minute:
                raise UserError(
                    f"there were {self._per_minute} votes in the last minute, the most that are "
                    "accepted; wait a minute and press Next again"
                )
            self._times.append(now)


# --------------------------------------------------------------------------------- Votes on disk


def append_vote(path: Path, vote: Mapping[str, Any]) -> None:
    """Appends a vote and waits until it is on the disk.

    Raises Failure if it cannot be written, and UserError if the file has MAX_FILE_BYTES.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            line = json.dumps({"time": time.time(), **vote}, ensure_ascii=True).encode() + b"\n"

            size = os.fstat(descriptor).st_size
            if size + len(line) > MAX_FILE_BYTES:
                raise UserError(
                    f"{path} has reached {MAX_FILE_BYTES >> 20} MiB, the most that is written; the "
                    "vote was not stored. Start the server with another --votes."
                )

            # A crash may have cut off the last line: start a new one
            if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line

            # A single write, so that a line is never mixed with another
            if os.write(descriptor, line) != len(line):
                raise OSError("it was written only partly")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Failure(
            f"the vote could not be written to {path} ({error}); free some disk space and vote "
            "again."
        ) from error


def read_votes(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the votes of a file; also returns the number of invalid lines (cut off or edited).

    If a voter has voted twice on a prompt, the later vote counts. Raises UserError if there is no
    such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise UserError(
            f"no votes in {path}: the file does not exist; `diffusion2gan serve --vote A B` "
            "creates it"
        ) from None
    except IsADirectoryError:
        raise UserError(
            f"{path} is a folder; give the file that `diffusion2gan serve --vote A B` creates"
        ) from None

    # Parse the lines; a later vote replaces an earlier one
    votes = {}
    num_invalid = 0
    for line in lines:
        if not line.strip():
            continue
        vote = _parse_vote(line)
        if vote is None:
            num_invalid += 1
        else:
            votes[vote["study"]["digest"], vote["voter"], vote["prompt_index"]] = vote
    return list(votes.values()), num_invalid


def _parse_vote(line: str) -> dict[str, Any] | None:
    """The vote on a line, or None if it is not one."""
    try:
        vote = json.loads(line)
    except (ValueError, RecursionError):
        return None

    # All fields, with the right types
    if not isinstance(vote, dict) or not all(field in vote for field in FIELDS):
        return None
    study = vote["study"]
    if not isinstance(study, dict) or set(study) != {"a", "b", "digest"}:
        return None
    if not isinstance(vote["prompt_index"], int):
        return None
    answers = [vote[question] for question in QUESTIONS]
    names = [*study.values(), vote["voter"], vote["left"], vote["right"]]
    if not all(isinstance(name, str) for name in names):
        return None

    # Every answer is one of the two systems, or none
    if not all(answer in (vote["left"], vote["right"], None) for answer in answers):
        return None
    return vote


def check_study(path: Path, study: Study) -> None:
    """Raises UserError if `path` already has votes on another study."""
    if not path.exists():
        return

    votes, _ = read_votes(path)
    for vote in votes:
        existing = vote["study"]
        if existing != asdict(study):
            raise UserError(
                f"{path} has votes on {existing['a']} against {existing['b']} (digest "
                f"{existing['digest']}), but this study is {study.a} against {study.b} (digest "
                f"{study.digest}): the systems, prompts or seed differ. "
                "Name another file with --votes."
            )


def voted_prompts(path: Path, voter: str) -> set[int]:
    """The indices of the prompts that a voter has voted on."""
    if not path.exists():
        return set()
    votes, _ = read_votes(path)
    return {vote["prompt_index"] for vote in votes if vote["voter"] == voter}


# ------------------------------------------------------------------------------------ Statistics


class Preference(NamedTuple):
    """How often `a` was preferred: `wins` of `num_votes`, `ties` of which saw no difference.

    A tie is half a vote for each system. `share` is (wins + ties / 2) / num_votes, `low` to `high`
    its interval, and `p_value` that of the hypothesis that both are preferred equally often.
    """

    wins: int
    num_votes: int
    share: float
    low: float
    high: float
    p_value: float
    ties: int = 0


def preference(wins: int, count: int, level: float = 0.95, *, ties: int = 0) -> Preference:
    """The share preferred with Wilson's interval, and the sign test of the hypothesis of one half.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927; the sign
    test leaves ties out (Dixon and Mood, "The statistical sign test", 1946). With ties the interval
    is wider than needed: a vote of one half varies less than one of 0 or 1. It assumes independent
    votes. Raises UserError if there are no votes.
    """
    if count < 1 or wins < 0 or ties < 0 or wins + ties > count:
        raise UserError(
            f"{wins} of {count} votes and {ties} ties: a share cannot be computed from these"
        )

    # Wilson's score interval: its centre and half width, from the normal quantile z
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = (wins + ties / 2) / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))

    return Preference(
        wins=wins,
        num_votes=count,
        share=share,
        low=max(0.0, centre - half),
        high=min(1.0, centre + half),
        p_value=_sign_test(wins, count - ties),
        ties=ties,
    )


def _sign_test(wins: int, count: int) -> float:
    """The exact two-sided probability of a result at least as uneven from a fair coin."""
    fewer = min(wins, count - wins)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * (tail / 2**count))


def summarize(path: Path) -> list[str]:
    """The lines that `diffusion2gan votes` prints: the preference per study and question.

    A warning comes first if the file has invalid lines. Raises UserError if it has no votes.
    """
    votes, num_invalid = read_votes(path)
    if not votes:
        raise UserError(f"no votes in {path} yet; it has {num_invalid} invalid lines")

    lines = []
    if num_invalid:
        lines.append(f"warning: {num_invalid} lines of {path} are not valid votes and are ignored")
    for study in dict.fromkeys(Study(**vote["study"]) for vote in votes):
        lines += _summarize_study(study, [v for v in votes if v["study"] == asdict(study)])
    return lines


def _summarize_study(study: Study, votes: Sequence[Mapping[str, Any]]) -> list[str]:
    # Counts
    num_voters = len({vote["voter"] for vote in votes})
    num_prompts = len({vote["prompt_index"] for vote in votes})
    lines = [
        f"{study.a} against {study.b}: {len(votes)} votes, {num_voters} voters, "
        f"{num_prompts} prompts"
    ]

    # Preferences
    for question in QUESTIONS:
        wins = sum(vote[question] == study.a for vote in votes)
        ties = sum(vote[question] is None for vote in votes)
        result = preference(wins, len(votes), ties=ties)
        counts = f"{result.wins} of {result.num_votes}"
        if ties:
            counts += f", {ties} no difference"
        lines.append(
            f"  {question}: {study.a} preferred {result.share:.1%} "
            f"[{result.low:.1%}, {result.high:.1%}] ({counts}), "
            f"p = {result.p_value:.2g} against even"
        )

    # Ties
    if any(vote[question] is None for vote in votes for question in QUESTIONS):
        lines.append(
            "  note: a vote for no difference counts as half a vote for each; the interval is that "
            "of as many decided votes, which is a little too wide, and p leaves these votes out"
        )

    # Several votes on a prompt: the interval is slightly too narrow
    if num_prompts < len(votes):
        lines.append(
            "  note: the intervals assume independent votes; several votes on the same prompt "
            "are not quite independent"
        )
    return lines
