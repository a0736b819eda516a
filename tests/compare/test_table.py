"""The metrics of a comparison: intervals, protocols, unknown keys, Markdown."""

from __future__ import annotations

import math

import pytest

from diffusion2gan.compare import table
from diffusion2gan.compare.table import Cell, Column


def column(name: str, **metrics: object) -> Column:
    return Column(name, [], metrics, "1 step")


def with_interval(name: str, value: float, low: float, high: float) -> Column:
    return column(name, frechet_distance=value, intervals={"frechet_distance": [low, high]})


def test_a_value_whose_interval_overlaps_the_best_is_tied() -> None:
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


def test_values_that_are_printed_alike_share_the_mark() -> None:
    a = column("a", seconds_per_image=0.03241)
    b = column("b", seconds_per_image=0.03242)
    c = column("c", seconds_per_image=1.0)
    ((_, cells),) = table.metric_rows([a, b, c])
    assert [cell.best for cell in cells] == [True, True, False]

    # Without a different value there is no best
    ((_, cells),) = table.metric_rows([a, b])
    assert [cell.best for cell in cells] == [False, False]


@pytest.mark.parametrize(
    "interval", [None, "12", [1], [1, 2, 3], [1, "x"], [1, math.nan], {"low": 1}]
)
def test_malformed_intervals_are_ignored(interval: object) -> None:
    system = column("a", frechet_distance=2.0, intervals={"frechet_distance": interval})
    assert table.get_interval(system, "frechet_distance") is None


def test_malformed_intervals_of_all_metrics_are_ignored() -> None:
    system = column("a", frechet_distance=2.0, intervals=7)
    assert table.get_interval(system, "frechet_distance") is None


def test_shares_are_shown_as_percentages_with_their_interval() -> None:
    system = column("a", attribute_accuracy=0.875, intervals={"attribute_accuracy": [0.85, 0.9]})
    ((_, cells),) = table.metric_rows([system])
    assert cells == [Cell("87.5 %", False, "85.0 % to 90.0 %")]

    (chart_system,) = table.chart_data([system])["systems"]
    assert chart_system["values"]["attribute_accuracy"] == pytest.approx([87.5, 85, 90])


def test_a_same_noise_distance_of_zero_is_not_shown() -> None:
    teacher = column("teacher", same_noise_distance=0.0)
    student = column("student", same_noise_distance=0.05)
    ((_, cells),) = table.metric_rows([teacher, student])
    assert [cell.text for cell in cells] == ["–", "0.05"]
    assert table.metric_rows([teacher]) == []


def test_unknown_keys_of_any_type_are_shown_in_the_other_table() -> None:
    system = column(
        "a", new=1.25, nested={"x": {"y": 2}}, flag=True, nothing=None, many=[1, 2], precision=0.5
    )
    assert table.other_rows([system]) == [
        ("new", ["1.25"]),
        ("nested.x.y", ["2"]),
        ("flag", ["True"]),
        ("nothing", ["–"]),
        ("many", ["[1, 2]"]),
    ]


def test_the_protocol_is_described_by_name_count_seed_and_interval_level() -> None:
    measured = column("b", protocol="pocket", count=64, seed=0)
    assert table.describe_protocol([column("a"), measured]) == "pocket, count 64, seed 0"
    with_level = column("a", protocol="pocket", interval_level=0.95)
    assert table.describe_protocol([with_level]) == "pocket, 95 % intervals"


def test_protocol_settings_are_described_by_their_name_and_listed_in_the_other_table() -> None:
    system = column("c", protocol={"name": "coco2014-30k", "resize": "lanczos"})
    assert table.describe_protocol([system]) == "coco2014-30k"
    assert ("protocol.resize", ["lanczos"]) in table.other_rows([system])


def test_markdown_is_escaped_and_marks_the_best() -> None:
    columns = [with_interval("a|b *x* <img>", 2, 1.5, 2.5), with_interval("c", 4, 3, 5)]
    text = table.markdown(columns, 3, {"note": "[x](y)"})
    assert r"| metric | a\|b \*x\* \<img\> (1 step) | c (1 step) |" in text
    assert "| Fréchet distance ↓ | **2** (1.5 to 2.5) | 4 (3 to 5) |" in text
    assert r"- note: \[x\](y)" in text
