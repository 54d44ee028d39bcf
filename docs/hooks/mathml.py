"""Mathematics as MathML, which browsers draw by themselves: nothing is loaded when a page is read."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\s*\\\[(?P<block>.*?)\\\]\s*)</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs calls this with each page's HTML, where pymdownx.arithmatex has marked the formulas."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    if found["inline"] is not None:
        return convert(html.unescape(found["inline"]))
    return convert(html.unescape(found["block"]).strip(), display="block")
