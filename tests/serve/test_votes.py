"""Votes: blind trials, a file with several concurrent writers, statistics checked against scipy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from scipy import stats

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.serve import votes
from diffusion2gan.serve.votes import Study, Trial

STUDY = Study("teacher", "student", "d1")
WAIT_S = 600  # at most, on a busy machine


def build_vote(
    voter: str = "v",
    index: int = 0,
    realism: str | None = "teacher",
    alignment: str | None = "student",
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
def test_interval_and_p_value_agree_with_scipy(wins: int, count: int, level: float) -> None:
    ours = votes.preference(wins, count, level)
    theirs = stats.binomtest(wins, count)
    interval = theirs.proportion_ci(level, "wilson")
    assert ours[:3] == (wins, count, wins / count)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)


@pytest.mark.parametrize(("wins", "losses", "ties"), [(7, 3, 5), (0, 0, 4), (12, 20, 1), (0, 6, 6)])
def test_no_difference_is_half_a_vote_for_each(wins: int, losses: int, ties: int) -> None:
    count = wins + losses + ties
    ours = votes.preference(wins, count, ties=ties)
    assert ours.share == (wins + ties / 2) / count
    assert (ours.wins, ours.num_votes, ours.ties) == (wins, count, ties)

    # The other system has the complement, and p leaves ties out
    other = votes.preference(losses, count, ties=ties)
    assert other.share == pytest.approx(1 - ours.share)
    assert (other.low, other.high) == pytest.approx((1 - ours.high, 1 - ours.low))
    decided = wins + losses
    expected = stats.binomtest(wins, decided).pvalue if decided else 1.0
    assert ours.p_value == other.p_value == pytest.approx(expected)

    # Two ties have the interval of one vote for each
    if ties % 2 == 0:
        as_votes = votes.preference(wins + ties // 2, count)
        assert (ours.low, ours.high) == pytest.approx((as_votes.low, as_votes.high))


@pytest.mark.parametrize(("p_win", "p_tie"), [(0.35, 0.3), (0.5, 0.2), (0.1, 0.6), (0.05, 0.05)])
def test_interval_with_ties_covers_the_true_share(p_win: float, p_tie: float) -> None:
    """The exact probability that it does, over all results of 30 votes."""
    count = 30
    truth = p_win + p_tie / 2
    covered = 0.0
    for wins in range(count + 1):
        for ties in range(count + 1 - wins):
            result = votes.preference(wins, count, ties=ties)
            if result.low <= truth <= result.high:
                counts = [wins, ties, count - wins - ties]
                shares = [p_win, p_tie, 1 - p_win - p_tie]
                covered += stats.multinomial.pmf(counts, count, shares)
    assert covered >= 0.94


def test_summary_counts_no_difference_and_says_how(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for index, realism in enumerate(["teacher", "teacher", None, "student"]):
        votes.append_vote(path, build_vote("one", index, realism=realism))
    found, num_invalid = votes.read_votes(path)
    assert num_invalid == 0 and found[2]["realism"] is None
    _, realism_line, alignment, note = votes.summarize(path)
    assert "teacher preferred 62.5% [" in realism_line
    assert "(2 of 4, 1 no difference), p = 1 against even" in realism_line
    assert "no difference" not in alignment
    assert "half a vote for each" in note


def test_missing_votes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 of 0 votes"):
        votes.preference(0, 0)
    with pytest.raises(UserError, match="3 of 4 votes and 2 ties"):
        votes.preference(3, 4, ties=2)
    with pytest.raises(UserError, match="the file does not exist"):
        votes.summarize(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        votes.summarize(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no votes in"):
        votes.summarize(tmp_path / "empty.jsonl")


def test_trials_are_random_and_repeat_for_the_same_voter() -> None:
    trials = votes.trial_order(STUDY, 400, "one")
    assert trials == votes.trial_order(STUDY, 400, "one")
    assert trials != votes.trial_order(STUDY, 400, "two")

    # Every prompt once, with both systems
    assert sorted(trial.prompt_index for trial in trials) == list(range(400))
    assert all({trial.left, trial.right} == {"teacher", "student"} for trial in trials)

    # Sides and order are random
    num_teacher_left = sum(trial.left == "teacher" for trial in trials)
    assert stats.binomtest(num_teacher_left, 400).pvalue > 0.001
    assert stats.kendalltau([t.prompt_index for t in trials], range(400)).pvalue > 0.001


def test_a_single_prompt_has_a_single_trial() -> None:
    (trial,) = votes.trial_order(Study("a", "b", "x"), 1, "v")
    assert trial in (Trial(0, "a", "b"), Trial(0, "b", "a"))


def append_votes(path: Path, voter: str, count: int) -> None:
    for index in range(count):
        votes.append_vote(path, build_vote(voter, index))


def test_concurrent_voters_lose_no_votes(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    context = multiprocessing.get_context("fork")
    voters = ("one", "two", "three")
    processes = [context.Process(target=append_votes, args=(path, voter, 150)) for voter in voters]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)

    assert len(path.read_bytes().splitlines()) == 450
    found, num_invalid = votes.read_votes(path)
    assert num_invalid == 0
    expected = {(voter, index) for voter in voters for index in range(150)}
    assert {(vote["voter"], vote["prompt_index"]) for vote in found} == expected
    assert votes.voted_prompts(path, "two") == set(range(150))
    assert votes.voted_prompts(path, "unknown") == set()


def append_and_report(path: Path, connection: Connection) -> None:
    """Votes without end; sends the index of each vote once `append_vote` has returned."""
    for index in range(10**6):
        votes.append_vote(path, build_vote("one", index))
        connection.send(index)


def test_a_killed_server_loses_no_vote_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=append_and_report, args=(path, sender))
        process.start()
        sender.close()

        # Kill it after a few votes, then read what it had still sent
        acknowledged = [receiver.recv() for _ in range(5 + 7 * attempt)]
        os.kill(process.pid, signal.SIGKILL)
        process.join(WAIT_S)
        with contextlib.suppress(EOFError):
            while True:
                acknowledged.append(receiver.recv())
        assert votes.voted_prompts(path, "one") >= set(acknowledged)

    # The lock of the killed process has been released
    votes.append_vote(path, build_vote("two", 0))
    assert votes.voted_prompts(path, "two") == {0}


def test_invalid_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    # The second line is cut off, as after a crash
    path = tmp_path / "votes.jsonl"
    votes.append_vote(path, build_vote(index=0))
    line = path.read_bytes()
    path.write_bytes(line + line[:40])
    votes.append_vote(path, build_vote(index=2))

    # Lines that are no votes, or have fields of the wrong type
    lines = ["[1]", '{"voter": "x"}', ""]
    for wrong in (
        {"realism": "neither"},
        {"voter": []},
        {"prompt_index": "0"},
        {"study": {"a": 1, "b": 2, "digest": 3}},
    ):
        lines.append(json.dumps({**build_vote(), **wrong}))
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")

    found, num_invalid = votes.read_votes(path)
    assert [vote["prompt_index"] for vote in found] == [0, 2]
    assert num_invalid == 7
    assert votes.summarize(path)[0].startswith("warning: 7 lines")


def test_the_later_of_two_votes_on_a_prompt_counts(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for realism in ("teacher", "student"):
        votes.append_vote(path, build_vote(realism=realism))
    found, _ = votes.read_votes(path)
    assert [vote["realism"] for vote in found] == ["student"]


def test_the_summary_has_a_preference_per_question(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for index in range(10):
        realism = "teacher" if index < 7 else "student"
        votes.append_vote(path, build_vote("one", index, realism=realism))
    votes.append_vote(path, build_vote("two", 0))

    head, realism, alignment, note = votes.summarize(path)
    assert head == "teacher against student: 11 votes, 2 voters, 10 prompts"
    interval = stats.binomtest(8, 11).proportion_ci(0.95, "wilson")
    expected = f"teacher preferred 72.7% [{interval.low:.1%}, {interval.high:.1%}] (8 of 11)"
    assert expected in realism
    assert "teacher preferred 0.0% [0.0%, " in alignment
    assert "independent" in note


def test_votes_of_different_studies_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    votes.check_study(path, STUDY)
    votes.append_vote(path, build_vote())
    votes.check_study(path, STUDY)
    with pytest.raises(
        UserError, match=r"teacher against student .* Name another file with --votes"
    ):
        votes.check_study(path, Study("teacher", "student", "d2"))


def test_a_vote_that_cannot_be_written_is_reported() -> None:
    with pytest.raises(Failure, match="could not be written to /dev/full"):
        votes.append_vote(Path("/dev/full"), build_vote())


def test_a_vote_waits_for_the_lock_of_another_writer(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    with path.open("a") as other_writer:
        fcntl.flock(other_writer, fcntl.LOCK_EX)
        thread = threading.Thread(target=votes.append_vote, args=(path, build_vote()))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert path.stat().st_size == 0

        fcntl.flock(other_writer, fcntl.LOCK_UN)
        thread.join(WAIT_S)
    found, _ = votes.read_votes(path)
    assert len(found) == 1
