"""The Python examples in the README and the docs run as they are printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    (page.relative_to(ROOT), code)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_example(page, code):
    exec(compile(code, str(page), "exec"), {})


def test_every_config_named_in_the_docs_is_there():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"config/[\w/]+\.yaml", page.read_text())}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
