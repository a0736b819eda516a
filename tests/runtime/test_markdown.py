"""Names of others inside a model card, read back by YAML and by a Markdown parser."""

from __future__ import annotations

import html

import pytest
import yaml

from diffusion2gan.runtime.markdown import inline_code, markdown_text, yaml_text

ODD = (
    "plain-1.5",
    "a: b",
    "# comment",
    "- item",
    "[list]",
    "{a: b}",
    "&anchor *alias !tag",
    "\"quotes\" and 'others'",
    "two\nlines\n---\nlicense: mit",
    "true",
    "null",
    "1.5",
    "1e5",
    "",
    "ünïcode ✓",
    "`code` ``more``",
    "<script>alert(1)</script>",
    "[link](http://example.com) ![image](x)",
    "*bold* _italic_ ~~gone~~",
    "back\\slash",
)


@pytest.mark.parametrize("text", ODD)
def test_yaml_reads_the_text_back(text: str) -> None:
    assert yaml.safe_load(f"license: {yaml_text(text)}\nother: 1") == {"license": text, "other": 1}


def test_simple_names_have_no_quotes() -> None:
    assert yaml_text("apache-2.0") == "apache-2.0" and yaml_text("openrail++") == "openrail++"


@pytest.mark.parametrize("text", ODD)
def test_markdown_shows_the_text_in_one_line(text: str) -> None:
    markdown = pytest.importorskip("markdown")
    line = " ".join(text.split())
    if line.startswith(("- ", "# ")):
        line = f"x {line}"  # no list and no heading within a line
    shown = html.unescape(markdown.markdown(f"x {markdown_text(line)} y"))
    assert shown == f"<p>x {line} y</p>".replace("  ", " ") or not line
    if line:
        code = html.unescape(markdown.markdown(f"x {inline_code(line)} y"))
        assert code == f"<p>x <code>{line}</code> y</p>"
