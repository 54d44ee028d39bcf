"""The project's pages, taken apart for the tests that hold them to the code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "infra").rglob("*.md")),
]


class Page(NamedTuple):
    """A page without its code, and the code.

    Attributes:
        text: what is in no fence.
        blocks: language and text of each fenced block, indentation taken off.
    """

    text: str
    blocks: list[tuple[str, str]]


@cache
def read_page(path: Path) -> Page:
    """The page at `path`, taken apart."""
    text: list[str] = []
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside:
                blocks.append((line.strip().lstrip("`").strip(), []))
        elif inside:
            blocks[-1][1].append(line.strip() if line.startswith("   ") and blocks[-1][0] == "" else line)
        else:
            text.append(line)
    return Page("\n".join(text), [(language, "\n".join(lines)) for language, lines in blocks])


def links(page: Page) -> list[str]:
    """What the page's links and pictures point to."""
    prose = re.sub(r"(`+)(?:(?!\1).)+\1", "", page.text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose)


def anchors(page: Page) -> set[str]:
    """The names of the page's headings, as mkdocs makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*)$", page.text, re.MULTILINE):
        own = re.search(r"\{ *#([\w-]+) *\}", heading)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        name = own[1] if own else slugify(plain, "-")
        found.append(name if name not in found else f"{name}_{found.count(name)}")
    return set(found)
