"""The Python examples in the pages run as they are printed, and links lead somewhere."""

import re
import subprocess
import sys

import pytest

from pages import PAGES, ROOT, anchors, links, read_page
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.build import schema

EXAMPLES = [
    (page.relative_to(ROOT), code)
    for page in PAGES
    for language, code in read_page(page).blocks
    if language == "python"
]


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_example(page, code):
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    assert not [link for link in links(read_page(page)) if not _leads_somewhere(page, link)]


def test_every_config_named_in_the_pages_is_there():
    named = {name for page in PAGES for name in re.findall(r"\b(?:config|infra)/[a-z0-9_/]+\.yaml", page.read_text())}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_reference_has_every_setting():
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    found = schema(TrainConfig)
    wanted = [path for path in found.sections if path]
    wanted += [f"{path} {name}" for path, kinds in found.choices.items() for name in kinds.get_known_choices()]
    assert not [name for name in wanted if f"<!-- fields of {name} -->" not in page]


def test_every_test_named_in_the_pages_is_there():
    named = {found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text())}
    assert named
    missing = [(file, test) for file, test in named if not (ROOT / file).exists()]
    assert not missing
    assert not [(file, test) for file, test in named if f"def {test}" not in (ROOT / file).read_text()]


@pytest.mark.slow  # `make docs` builds it, too
def test_the_site_is_built_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(mkdocs, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    site = {page.relative_to(tmp_path): page.read_text() for page in tmp_path.rglob("*.html")}
    loads = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?https?:|<link\b[^>]*\brel=\"?stylesheet[^>]*https?:"
    assert len(site) > 20
    assert not [page for page, text in site.items() if re.search(loads, text)]
    assert not [page for page, text in site.items() if "arithmatex" in text], (
        "mathematics that was not turned into MathML"
    )


def _leads_somewhere(page, link):
    if re.match(r"(https?|mailto):", link):
        return True
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not target.exists():
        return False
    # Those of the reference are made of docstrings; a strict build checks them.
    return not anchor or anchor.startswith("sophia_levanter.") or anchor in anchors(read_page(target))
