"""The numbers of a comparison: intervals, protocols, unknown keys, Markdown."""

from __future__ import annotations

import math

import pytest

from diffusion2gan.compare import table
from diffusion2gan.compare.table import Cell, Column


def column(name: str, **metrics: object) -> Column:
    return Column(name, [], metrics, "1 step")


def with_interval(name: str, value: float, low: float, high: float) -> Column:
    return column(name, frechet_distance=value, intervals={"frechet_distance": [low, high]})


def test_an_interval_that_overlaps_the_best_is_not_told_from_it() -> None:
    columns = [
        with_interval("a", 2, 1.5, 2.5),
        with_interval("b", 3, 2.5, 3.5),
        with_interval("c", 4, 2.6, 5),
    ]
    ((_, cells),) = table.metric_rows(columns)
    assert cells == [
        Cell("2", True, "1.5 to 2.5", False),
        Cell("3", False, "2.5 to 3.5", True),
        Cell("4", False, "2.6 to 5", False),
    ]


def test_numbers_that_read_alike_share_the_mark() -> None:
    a, b, c = (
        column(name, seconds_per_image=value)
        for name, value in (("a", 0.03241), ("b", 0.03242), ("c", 1.0))
    )
    assert [cell.best for cell in table.metric_rows([a, b, c])[0][1]] == [True, True, False]
    assert [cell.best for cell in table.metric_rows([a, b])[0][1]] == [False, False]


@pytest.mark.parametrize("pair", [None, "12", [1], [1, 2, 3], [1, "x"], [1, math.nan], {"low": 1}])
def test_an_interval_that_is_none_is_left_out(pair: object) -> None:
    one = column("a", frechet_distance=2.0, intervals={"frechet_distance": pair})
    assert table.interval(one, "frechet_distance") is None
    assert (
        table.interval(column("a", frechet_distance=2.0, intervals=7), "frechet_distance") is None
    )


def test_shares_are_shown_as_per_cent_with_their_interval() -> None:
    one = column("a", attribute_accuracy=0.875, intervals={"attribute_accuracy": [0.85, 0.9]})
    assert table.metric_rows([one])[0][1] == [Cell("87.5 %", False, "85.0 % to 90.0 %")]
    (system,) = table.chart_data([one])["systems"]
    assert system["values"]["attribute_accuracy"] == pytest.approx([87.5, 85, 90])


def test_a_distance_to_itself_is_no_merit() -> None:
    columns = [
        column("teacher", same_noise_distance=0.0),
        column("student", same_noise_distance=0.05),
    ]
    assert [cell.text for cell in table.metric_rows(columns)[0][1]] == ["–", "0.05"]
    assert table.metric_rows(columns[:1]) == []


def test_unknown_keys_are_shown_whatever_they_are() -> None:
    one = column(
        "a", new=1.25, nested={"x": {"y": 2}}, flag=True, nothing=None, many=[1, 2], precision=0.5
    )
    assert table.other_rows([one]) == [
        ("new", ["1.25"]),
        ("nested.x.y", ["2"]),
        ("flag", ["True"]),
        ("nothing", ["–"]),
        ("many", ["[1, 2]"]),
    ]


def test_the_protocol_in_words() -> None:
    assert (
        table.protocol([column("a"), column("b", protocol="pocket", count=64, seed=0)])
        == "pocket, count 64, seed 0"
    )
    assert (
        table.protocol([column("a", protocol="pocket", interval_level=0.95)])
        == "pocket, 95 % intervals"
    )
    settings = column("c", protocol={"name": "coco2014-30k", "resize": "lanczos"})
    assert table.protocol([settings]) == "coco2014-30k"
    assert ("protocol.resize", ["lanczos"]) in table.other_rows([settings])


def test_markdown_is_escaped_and_marks_the_best() -> None:
    columns = [with_interval("a|b *x* <img>", 2, 1.5, 2.5), with_interval("c", 4, 3, 5)]
    text = table.markdown(columns, 3, {"note": "[x](y)"})
    assert r"| metric | a\|b \*x\* \<img\> (1 step) | c (1 step) |" in text
    assert "| Fréchet distance ↓ | **2** (1.5 to 2.5) | 4 (3 to 5) |" in text
    assert r"- note: \[x\](y)" in text
