"""The page and the grid of a comparison, from small images."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFont

from diffusion2gan.compare import grid, report, table
from diffusion2gan.compare.table import Column
from diffusion2gan.errors import UserError

PROMPTS = ["a red ball on sand", "a blue <b>box</b>", "<script>alert(1)</script>"]
DETAILS = {"teacher": "pocket", "seed": "5"}


def build_image(shade: int, side: int = 64) -> Image.Image:
    return (
        Image.linear_gradient("L")
        .resize((side, side))
        .point(lambda v: (v + shade) % 256)
        .convert("RGB")
    )


def build_column(
    name: str, shade: int, metrics: dict[str, Any] | None = None, side: int = 64
) -> Column:
    images = [build_image(shade + row, side) for row in range(len(PROMPTS))]
    return Column(name, images, metrics or {}, note="50 steps")


def teacher_and_student() -> list[Column]:
    slow = {"frechet_distance": 3.0, "attribute_accuracy": 0.75, "count": 64}
    fast = {"frechet_distance": 4.5, "attribute_accuracy": 0.875, "clip_score": 0.31}
    return [build_column("teacher", 0, slow), build_column("student", 100, fast)]


def write_page(folder: Path, columns: list[Column]) -> str:
    report.write_report(folder, columns, PROMPTS, DETAILS)
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_page_embeds_every_image_bit_for_bit(tmp_path: Path) -> None:
    columns = teacher_and_student()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', write_page(tmp_path, columns))
    found = [Image.open(io.BytesIO(base64.b64decode(data))).tobytes() for data in embedded]
    assert found == [c.images[row].tobytes() for row in range(3) for c in columns]  # type: ignore[union-attr]


def test_the_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    html = write_page(tmp_path, teacher_and_student())
    assert "http://" not in html and "https://" not in html
    assert not re.search(r"<link\b|<script[^>]+src|@import|url\(", html)
    assert set(re.findall(r'(?:src|href)="(.{5})', html)) == {"data:"}


def test_prompts_names_and_details_are_escaped(tmp_path: Path) -> None:
    columns = [Column('"><img onerror=x>', [build_image(0)] * 3, {"</table>": "<i>"}, note="<u>")]
    report.write_report(tmp_path, columns, PROMPTS, {"<dt>": "<script>"})
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert 'alt="&#34;&gt;&lt;img onerror=x&gt;: a red ball on sand"' in html
    assert '<th scope="row">&lt;/table&gt;' in html
    assert html.count("<script>") == 1 and "<u>" not in html and "<i>" not in html


def test_the_report_consists_of_four_files(tmp_path: Path) -> None:
    write_page(tmp_path / "new", teacher_and_student())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "grid.pdf",
        "grid.png",
        "index.html",
        "report.md",
    ]
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert image.size == grid.draw_grid(teacher_and_student(), PROMPTS).size


@pytest.mark.parametrize(
    ("side", "cell"), [(64, 128), (48, 144), (128, 128), (200, 200), (1024, 512)]
)
def test_the_size_of_the_grid_follows_from_its_cells(side: int, cell: int) -> None:
    columns = [build_column("teacher", 0, side=side), build_column("student", 100, side=side)]
    text = max(14, cell // 18)
    width = grid.GAP + 14 * text + grid.GAP + 2 * (cell + grid.GAP)
    height = grid.GAP + 2 * grid.line_height(text) + grid.GAP + 3 * (cell + grid.GAP)
    assert grid.draw_grid(columns, PROMPTS).size == (width, height)


def test_the_grid_has_each_image_in_its_row_and_column() -> None:
    colours = [["red", "lime", "blue"], ["yellow", "cyan", "magenta"]]
    columns = [
        Column(str(i), [Image.new("RGB", (64, 64), c) for c in row], {})
        for i, row in enumerate(colours)
    ]
    sheet, layout = grid.draw_grid(columns, PROMPTS), grid.compute_layout(columns)
    for index, row in [(i, r) for i in range(2) for r in range(3)]:
        x, y = layout.corner(row, index)
        cell = sheet.crop((x, y, x + 128, y + 128))
        assert cell.getcolors() == [(128 * 128, columns[index].images[row].getpixel((0, 0)))]  # type: ignore[union-attr]


def test_a_missing_image_leaves_a_blank_cell_of_the_same_size(tmp_path: Path) -> None:
    images = [build_image(0), None, build_image(2)]
    columns = [Column("student", images, {}, note="50 steps")]
    assert (
        grid.draw_grid(columns, PROMPTS).size
        == grid.draw_grid([build_column("teacher", 0)], PROMPTS).size
    )
    report.write_report(tmp_path, columns, PROMPTS, {})
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert html.count('src="data:') == 2 and html.count(">no image<") == 1


def test_the_best_value_is_the_lowest_or_highest_by_metric(tmp_path: Path) -> None:
    rows = {
        metric.key: [cell[:2] for cell in cells]
        for metric, cells in table.metric_rows(teacher_and_student())
    }
    assert rows["frechet_distance"] == [("3", True), ("4.5", False)]
    assert rows["attribute_accuracy"] == [("75.0 %", False), ("87.5 %", True)]
    assert rows["clip_score"] == [("–", False), ("0.31", False)]  # alone in its row
    assert list(rows) == ["frechet_distance", "clip_score", "attribute_accuracy"]
    assert write_page(tmp_path, teacher_and_student()).count('<span class="tag">best</span>') == 2


def test_a_value_that_is_not_finite_is_shown_but_never_best() -> None:
    values = [float("nan"), 2.0, float("-inf"), 1.0]
    columns = [Column(str(v), [], {"frechet_distance": v}) for v in values]
    ((_, cells),) = table.metric_rows(columns)
    assert [cell[:2] for cell in cells] == [
        ("nan", False),
        ("2", False),
        ("-inf", False),
        ("1", True),
    ]


def test_equal_values_share_the_mark_or_have_none() -> None:
    assert table.best_value([1.0, 1.0, 2], "lower") == 1.0
    assert table.best_value([1.0, 1.0], "lower") is None
    assert table.best_value([None, float("nan"), 1.0], "lower") is None


def test_other_keys_are_listed_in_the_other_table() -> None:
    columns = [
        build_column("a", 0, {"count": 64, "clip_score": 0.3, "attributes": {"shape": 0.5}}),
        build_column("b", 1, {"clip_weights_sha256": "ab12"}),
    ]
    assert table.other_rows(columns) == [
        ("count", ["64", "–"]),
        ("attributes.shape", ["0.5", "–"]),
        ("clip_weights_sha256", ["–", "ab12"]),
    ]


def test_a_column_of_the_wrong_length_is_named_with_both_lengths(tmp_path: Path) -> None:
    columns = [build_column("teacher", 0), Column("student", [build_image(0)] * 2, {})]
    with pytest.raises(UserError, match="'student' has 2 images for 3 prompts"):
        report.write_report(tmp_path, columns, PROMPTS, DETAILS)
    with pytest.raises(UserError, match="nothing to compare"):
        grid.draw_grid([], PROMPTS)
    assert not list(tmp_path.iterdir())


def test_text_is_wrapped_and_truncated_to_its_box() -> None:
    font = ImageFont.load_default(14)
    lines = grid.fit_text("a small green cat beside a tree " * 9 + "x" * 90, font, 120, max_lines=5)
    assert len(lines) == 5 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(grid.fit_text("x" * 90, font, 120, max_lines=50)) == "x" * 90
    assert grid.fit_text("", font, 120, max_lines=5) == []


# ---------------------------------------------------------------------- Hostile or large content


LONG = "a very long prompt " * 526 + "the end"  # 10 001 characters
UNUSUAL = [
    LONG,
    "\u202ea reversed prompt",
    "كرة حمراء على الرمل",
    "🦊 in the 🌧️",
    "</script><script>alert(1)</script>",
    "{{ 7*7 }}",
    "x" * 10_000,
    "'\"`&amp;<!--",
    "\x00\x07",
]


def write_unusual_report(folder: Path) -> str:
    images = [build_image(0, 16)] * len(UNUSUAL)
    report.write_report(
        folder,
        [Column("a", images, {"frechet_distance": float("nan")}), Column("b", images, {})],
        UNUSUAL,
        {},
    )
    return (folder / "index.html").read_text(encoding="utf-8")


def test_unusual_prompts_are_escaped_and_truncated(tmp_path: Path) -> None:
    html = write_unusual_report(tmp_path)
    shown = html.split('id="raw"')[0]
    assert html.count("<script") == html.count("</script>") == 3 and "{{ 7*7 }}" in shown
    assert "the end" not in shown and "and 9001 more characters" in shown and len(shown) < 120_000
    assert html.count('class="prompt" dir="auto"') == len(UNUSUAL)


def test_the_download_has_everything_but_the_images(tmp_path: Path) -> None:
    text = re.search(r'id="raw">(.*?)</script>', write_unusual_report(tmp_path), re.S)
    assert text
    data = json.loads(text[1])
    assert data["prompts"] == UNUSUAL
    assert data["systems"][0] == {"name": "a", "note": "", "metrics": {"frechet_distance": None}}


def test_many_images_are_embedded_as_smaller_files() -> None:
    one = Image.new("RGB", (1024, 1024))
    assert report.choose_embedding([Column("a", [one] * 22, {})]) is report.EXACT
    assert report.choose_embedding([Column("a", [one] * 24, {})]) is report.COMPACT
    assert report.choose_embedding([Column("a", [one, None] * 400, {})]) is report.SMALL
    for embedding, side in ((report.COMPACT, 1024), (report.SMALL, 512)):
        form, data = report.data_uri(one, embedding).removeprefix("data:image/").split(";base64,")
        assert form == "webp" and Image.open(io.BytesIO(base64.b64decode(data))).size == (
            side,
            side,
        )


def test_rows_beyond_a_full_sheet_start_new_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "MAX_PIXELS", 400_000)
    prompts = [f"prompt {i}" for i in range(7)]
    columns = [Column(name, [build_image(i, 32) for i in range(7)], {}) for name in ("a", "b")]
    rows = grid.write_grid(tmp_path, columns, prompts)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width * sheet.height <= 400_000 and 1 < rows < 7
    pages = re.findall(rb"/Type /Page\b(?!s)", (tmp_path / "grid.pdf").read_bytes())
    assert len(pages) == -(-7 // rows)
    report.write_report(tmp_path, columns, prompts, {})
    assert f"the first {rows} of 7 prompts" in (tmp_path / "report.md").read_text()
