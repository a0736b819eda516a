"""Text of others, such as the name of a model, inside a model card."""

from __future__ import annotations

import html
import json
import re

PLAIN_YAML = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# Words that YAML reads as something else than a text
YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off")


def yaml_text(text: str) -> str:
    """`text` as a value in YAML, in quotes if it needs them."""
    is_number = re.fullmatch(r"[0-9.+_eE-]+", text)
    if PLAIN_YAML.fullmatch(text) and text.lower() not in YAML_WORDS and not is_number:
        return text
    return json.dumps(text, ensure_ascii=False)


def markdown_text(text: str) -> str:
    """`text` in one line, so that Markdown shows it as it is."""
    line = html.escape(" ".join(text.split()), quote=False)
    line = line.replace("~", "&#126;").replace("|", "&#124;")
    return re.sub(r"([\\`*_\[\]!]|(?<!&)#)", r"\\\1", line)


def inline_code(text: str) -> str:
    """`text` in one line between more backticks than it contains in a row."""
    line = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    if longest == 0:
        return f"`{line}`"
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}"
