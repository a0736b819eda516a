"""The fuzzers at a tenth of their numbers find nothing, and would find what is planted."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import fuzz
from faults.fuzz import Kind, Outcomes

from diffusion2gan.errors import MAX_END, MAX_START, UserError


@pytest.mark.slow
def test_a_tenth_of_the_recipes_and_command_lines(tmp_path: Path) -> None:
    recipes = fuzz.fuzz_recipes(fuzz.COUNTS["recipes"] // 10, 1, tmp_path)
    assert recipes.problems == [] and recipes.counts.total() == 1_000
    assert min(recipes.counts["accepted"], recipes.counts["refused"]) > 10

    lines = fuzz.fuzz_command_lines(fuzz.COUNTS["command_lines"] // 10, 1, tmp_path)
    assert lines.problems == [] and lines.counts.total() == 100


@pytest.mark.slow
def test_a_tenth_of_the_damages_and_all_untrusted_files(tmp_path: Path) -> None:
    found = fuzz.fuzz_damage(fuzz.COUNTS["damage"] // 10, 1, tmp_path)
    assert [outcomes.problems for outcomes in found.values() if outcomes.problems] == []
    assert len(found) > 20 and all(outcomes.counts.total() >= 10 for outcomes in found.values())

    found = fuzz.try_untrusted(tmp_path)
    assert [outcomes.problems for outcomes in found.values() if outcomes.problems] == []
    assert sum(outcomes.counts.total() for outcomes in found.values()) > 300


def test_planted_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> str:
        def call() -> None:
            raise error

        outcomes = Outcomes.empty()
        assert fuzz.attempt("x", call, outcomes) == (False, None)
        return outcomes.problems[0] if outcomes.problems else "none"

    assert fail(UserError("a plain message about a file")) == "none"
    assert "ValueError: no" in fail(ValueError("no"))
    assert "advises deleting" in fail(UserError("it is damaged; delete it and go on"))

    # A checked kind whose reader does not notice, and one that runs code
    (tmp_path / "damage").mkdir()
    (tmp_path / "damage" / "file").write_bytes(bytes(64))
    silent = Kind("silent", ("file",), lambda folder: (folder / "file").read_bytes(), True)
    monkeypatch.setattr(fuzz, "build_files", lambda folder: [silent])
    (outcomes,) = fuzz.fuzz_damage(20, 0, tmp_path).values()
    assert "another value, in silence" in outcomes.problems[0]

    import pickle

    (tmp_path / "untrusted").mkdir()
    (tmp_path / "untrusted" / "file").touch()

    def unpickle(folder: Path) -> None:
        content = (folder / "file").read_bytes()
        if content.startswith(b"\x80"):
            pickle.loads(content)

    monkeypatch.setattr(fuzz, "build_files", lambda folder: [Kind("p", ("file",), unpickle)])
    found = fuzz.try_untrusted(tmp_path)
    assert "code was run" in found["pickle that runs code"].problems[0]


def test_errors_are_one_paragraph() -> None:
    message = str(UserError("first\n  second\x1b[31m \n\n" + "x" * 5000 + " the remedy"))
    assert message.startswith("first second�[31m") and message.endswith("the remedy")
    assert "\n" not in message and len(message) < MAX_START + MAX_END + 10
    assert str(UserError("two  spaces stay")) == "two  spaces stay"
