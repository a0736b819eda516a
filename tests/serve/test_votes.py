"""Votes: blind trials, a file that several append to at once, and an interval checked against scipy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.serve import votes
from diffusion2gan.serve.votes import Study, Trial

STUDY = Study("teacher", "student", "d1")


def vote(
    voter: str = "v", index: int = 0, realism: str = "teacher", alignment: str = "student"
) -> dict[str, object]:
    return {
        "study": {"a": "teacher", "b": "student", "digest": "d1"},
        "voter": voter,
        "prompt_index": index,
        "prompt": "a red ring\n",
        "left": "student",
        "right": "teacher",
        "realism": realism,
        "alignment": alignment,
    }


@pytest.mark.parametrize(
    ("wins", "count"), [(0, 1), (1, 1), (7, 10), (50, 100), (3, 400), (999, 1000), (61, 100)]
)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_and_the_test_are_scipys(wins: int, count: int, level: float) -> None:
    ours, theirs = votes.preference(wins, count, level), stats.binomtest(wins, count)
    interval = theirs.proportion_ci(level, "wilson")
    assert ours[:3] == (wins, count, wins / count)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)


def test_no_vote_has_no_preference(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 of 0 votes"):
        votes.preference(0, 0)
    with pytest.raises(UserError, match="the file is missing"):
        votes.summary(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        votes.summary(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no votes in"):
        votes.summary(tmp_path / "empty.jsonl")


def test_trials_are_blind_and_stay_a_voters_own() -> None:
    first = votes.trial_order(STUDY, 400, "one")
    assert first == votes.trial_order(STUDY, 400, "one") != votes.trial_order(STUDY, 400, "two")
    assert sorted(trial.prompt_index for trial in first) == list(range(400))
    assert all({trial.left, trial.right} == {"teacher", "student"} for trial in first)
    assert stats.binomtest(sum(trial.left == "teacher" for trial in first), 400).pvalue > 0.001
    assert stats.kendalltau([t.prompt_index for t in first], range(400)).pvalue > 0.001
    assert votes.trial_order(Study("a", "b", "x"), 1, "v")[0] in (
        Trial(0, "a", "b"),
        Trial(0, "b", "a"),
    )


def many(path: Path, voter: str, count: int) -> None:
    for index in range(count):
        votes.append_vote(path, vote(voter, index))


def test_two_voters_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=many, args=(path, name, 150)) for name in ("one", "two", "three")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(path.read_bytes().splitlines()) == 450
    found, num_bad = votes.read_votes(path)
    assert num_bad == 0 and {(v["voter"], v["prompt_index"]) for v in found} == {
        (name, index) for name in ("one", "two", "three") for index in range(150)
    }
    assert votes.voted(path, "two") == set(range(150)) and votes.voted(path, "nobody") == set()


def and_tell(path: Path, told: Any) -> None:
    """Votes without end, and says of each when `append_vote` has returned."""
    for index in range(10**6):
        votes.append_vote(path, vote("one", index))
        told.send(index)


def test_a_server_that_is_killed_loses_no_vote_that_was_given(tmp_path: Path) -> None:
    path, context = tmp_path / "votes.jsonl", multiprocessing.get_context("fork")
    for round_ in range(3):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=and_tell, args=(path, there))
        process.start()
        there.close()
        told = [here.recv() for _ in range(5 + 7 * round_)]
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        with contextlib.suppress(EOFError):
            while True:
                told.append(here.recv())
        assert votes.voted(path, "one") >= set(told)
    votes.append_vote(path, vote("two", 0))  # the killed one's lock is gone
    assert votes.voted(path, "two") == {0}


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    votes.append_vote(path, vote(index=0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])  # the machine stopped in the middle of the second
    votes.append_vote(path, vote(index=2))
    odds = [
        {"realism": "neither"},
        {"voter": []},
        {"prompt_index": "0"},
        {"study": {"a": 1, "b": 2, "digest": 3}},
    ]
    with path.open("a") as file:
        file.write(
            '[1]\n{"voter": "x"}\n\n' + "\n".join(json.dumps(vote() | odd) for odd in odds) + "\n"
        )
    found, num_bad = votes.read_votes(path)
    assert [v["prompt_index"] for v in found] == [0, 2] and num_bad == 7
    assert votes.summary(path)[0].startswith("warning: 7 lines")


def test_of_two_votes_on_one_prompt_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for realism in ("teacher", "student"):
        votes.append_vote(path, vote(realism=realism))
    assert [v["realism"] for v in votes.read_votes(path)[0]] == ["student"]


def test_the_summary_counts_by_question(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for index in range(10):
        votes.append_vote(path, vote("one", index, realism="teacher" if index < 7 else "student"))
    votes.append_vote(path, vote("two", 0))
    head, realism, alignment, caution = votes.summary(path)
    assert head == "teacher against student: 11 votes, 2 voters, 10 prompts"
    interval = stats.binomtest(8, 11).proportion_ci(0.95, "wilson")
    assert f"teacher preferred 72.7% [{interval.low:.1%}, {interval.high:.1%}] (8 of 11)" in realism
    assert "teacher preferred 0.0% [0.0%, " in alignment and "independent" in caution


def test_votes_on_something_else_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    votes.check_study(path, STUDY)
    votes.append_vote(path, vote())
    votes.check_study(path, STUDY)
    with pytest.raises(
        UserError, match=r"teacher against student .* Name another file with --votes"
    ):
        votes.check_study(path, Study("teacher", "student", "d2"))


def test_a_vote_that_cannot_be_written_is_told() -> None:
    with pytest.raises(Failure, match="could not be written to /dev/full"):
        votes.append_vote(Path("/dev/full"), vote())


def test_a_vote_waits_for_the_one_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=votes.append_vote, args=(path, vote()))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and path.stat().st_size == 0
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join(60)
    assert len(votes.read_votes(path)[0]) == 1
