"""The comparison's page and grid, from small real pictures."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from diffusion2gan.compare import report
from diffusion2gan.compare.report import Column
from diffusion2gan.errors import UserError

PROMPTS = ["a red ball on sand", "a blue <b>box</b>", "<script>alert(1)</script>"]
DETAILS = {"teacher": "pocket", "seed": "5"}


def picture(shade: int, side: int = 64) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side)).point(lambda v: (v + shade) % 256).convert("RGB")


def column(name: str, shade: int, metrics: dict[str, float | int | str] | None = None, side: int = 64) -> Column:
    images = [picture(shade + row, side) for row in range(len(PROMPTS))]
    return Column(name, images, metrics or {}, note="50 steps")


def both() -> list[Column]:
    slow: dict[str, float | int | str] = {"frechet_distance": 3.0, "attribute_accuracy": 0.75, "count": 64}
    fast: dict[str, float | int | str] = {"frechet_distance": 4.5, "attribute_accuracy": 0.875, "clip_score": 0.31}
    return [column("teacher", 0, slow), column("student", 100, fast)]


def page(folder: Path, columns: list[Column]) -> str:
    report.write_report(folder, columns, PROMPTS, DETAILS)
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_page_holds_every_picture_bit_for_bit(tmp_path: Path) -> None:
    columns = both()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page(tmp_path, columns))
    found = [Image.open(io.BytesIO(base64.b64decode(data))).tobytes() for data in embedded]
    assert found == [c.images[row].tobytes() for row in range(3) for c in columns]  # type: ignore[union-attr]


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    html = page(tmp_path, both())
    assert "http://" not in html and "https://" not in html
    assert not re.search(r"<link\b|<script[^>]+src|@import|url\(", html)
    assert set(re.findall(r'(?:src|href)="(.{5})', html)) == {"data:"}


def test_prompts_names_and_details_are_escaped(tmp_path: Path) -> None:
    columns = [Column('"><img onerror=x>', [picture(0)] * 3, {"</table>": "<i>"}, note="<u>")]
    report.write_report(tmp_path, columns, PROMPTS, {"<dt>": "<script>"})
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert 'alt="&#34;&gt;&lt;img onerror=x&gt;: a red ball on sand"' in html
    assert '<th scope="row">&lt;/table&gt;' in html
    assert html.count("<script>") == 1 and "<u>" not in html and "<i>" not in html


def test_the_folder_holds_the_page_and_the_grid_alone(tmp_path: Path) -> None:
    page(tmp_path / "new", both())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["grid.png", "index.html"]
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert image.size == report.grid(both(), PROMPTS).size


@pytest.mark.parametrize(("side", "cell"), [(64, 128), (48, 144), (128, 128), (200, 200), (1024, 512)])
def test_the_grid_has_one_cell_a_picture(side: int, cell: int) -> None:
    columns = [column("teacher", 0, side=side), column("student", 100, side=side)]
    text = max(14, cell // 18)
    width = report.GAP + 14 * text + report.GAP + 2 * (cell + report.GAP)
    height = report.GAP + 2 * report.line_height(text) + report.GAP + 3 * (cell + report.GAP)
    assert report.grid(columns, PROMPTS).size == (width, height)


def test_the_grid_puts_each_picture_in_its_place() -> None:
    colours = [["red", "lime", "blue"], ["yellow", "cyan", "magenta"]]
    columns = [Column(str(i), [Image.new("RGB", (64, 64), c) for c in row], {}) for i, row in enumerate(colours)]
    sheet, layout = report.grid(columns, PROMPTS), report.measure(columns)
    for index, row in [(i, r) for i in range(2) for r in range(3)]:
        x, y = layout.corner(row, index)
        cell = sheet.crop((x, y, x + 128, y + 128))
        assert cell.getcolors() == [(128 * 128, columns[index].images[row].getpixel((0, 0)))]  # type: ignore[union-attr]


def test_a_missing_picture_leaves_a_blank_of_the_same_size(tmp_path: Path) -> None:
    images = [picture(0), None, picture(2)]
    columns = [Column("student", images, {}, note="50 steps")]
    assert report.grid(columns, PROMPTS).size == report.grid([column("teacher", 0)], PROMPTS).size
    report.write_report(tmp_path, columns, PROMPTS, {})
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count('src="data:') == 2 and html.count(">no picture<") == 1


def test_the_best_is_the_lower_or_the_higher_as_the_metric_has_it(tmp_path: Path) -> None:
    rows = {metric.key: cells for metric, cells in report.metric_rows(both())}
    assert rows["frechet_distance"] == [("3", True), ("4.5", False)]
    assert rows["attribute_accuracy"] == [("75.0 %", False), ("87.5 %", True)]
    assert rows["clip_score"] == [("–", False), ("0.31", False)]  # alone in its row
    assert list(rows) == ["frechet_distance", "clip_score", "attribute_accuracy"]
    assert page(tmp_path, both()).count('<span class="tag">best</span>') == 2


def test_a_number_that_is_not_finite_is_shown_and_never_best() -> None:
    values = [float("nan"), 2.0, float("-inf"), 1.0]
    columns = [Column(str(v), [], {"frechet_distance": v}) for v in values]
    ((_, cells),) = report.metric_rows(columns)
    assert cells == [("nan", False), ("2", False), ("-inf", False), ("1", True)]


def test_equal_numbers_share_the_mark_or_have_none() -> None:
    assert report.best_value([1.0, 1.0, 2], "lower") == 1.0
    assert report.best_value([1.0, 1.0], "lower") is None
    assert report.best_value([None, "n/a", 1.0], "lower") is None


def test_other_keys_go_to_the_small_table() -> None:
    columns = [column("a", 0, {"count": 64, "clip_score": 0.3}), column("b", 1, {"clip_weights_sha256": "ab12"})]
    assert report.other_rows(columns) == [("count", ["64", "–"]), ("clip_weights_sha256", ["–", "ab12"])]


def test_a_column_of_another_length_is_named_with_both_numbers(tmp_path: Path) -> None:
    columns = [column("teacher", 0), Column("student", [picture(0)] * 2, {})]
    with pytest.raises(UserError, match="'student' has 2 pictures for 3 prompts"):
        report.write_report(tmp_path, columns, PROMPTS, DETAILS)
    with pytest.raises(UserError, match="nothing to compare"):
        report.grid([], PROMPTS)
    assert not list(tmp_path.iterdir())


def test_text_is_broken_and_cut_to_its_box() -> None:
    font = ImageFont.load_default(14)
    lines = report.fit_text("a small green cat beside a tree " * 9 + "x" * 90, font, 120, lines=5)
    assert len(lines) == 5 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(report.fit_text("x" * 90, font, 120, lines=50)) == "x" * 90
    assert report.fit_text("", font, 120, lines=5) == []
