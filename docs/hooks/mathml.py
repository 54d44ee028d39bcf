"""Convert formulas to MathML, which browsers render without loading scripts or fonts."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\s*\\\[(?P<block>.*?)\\\]\s*)</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Convert the formulas marked by pymdownx.arithmatex. mkdocs calls this with each page's HTML."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    if found["inline"] is not None:
        return convert(html.unescape(found["inline"]))
    return convert(html.unescape(found["block"]).strip(), display="block")
