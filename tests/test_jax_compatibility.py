"""The names of jax that are defined for haliax, and when they can go."""

import importlib.util
import re
import warnings
from pathlib import Path

import haliax as hax
import jax
import jax.export
import jax.numpy as jnp

import sophia_levanter.jax_compatibility  # noqa: F401
from pages import ROOT

SRC = ROOT / "src"


def imported_modules(path, pattern):
    return re.findall(rf"^(?:from|import) ({pattern}[\w.]*)", path.read_text(), re.MULTILINE)


def reached_from(path, seen):
    """Every file of the project that importing this one runs."""
    if path not in seen:
        seen.add(path)
        for module in imported_modules(path, r"sophia_levanter\."):
            file = SRC / Path(*module.split(".")).with_suffix(".py")
            reached_from(file if file.exists() else file.with_suffix("") / "__init__.py", seen)
    return seen


def test_haliax_needs_the_name():
    (folder,) = importlib.util.find_spec("haliax").submodule_search_locations
    sources = "".join(path.read_text() for path in Path(folder).rglob("*.py"))
    assert "jax.core.is_constant_dim" in sources, "delete jax_compatibility.py: haliax works without it"


def test_contracting_axes_needs_nothing_that_is_deprecated_or_gone():
    x, y = hax.ones({"row": 2, "inner": 3}), hax.ones({"inner": 3, "column": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        product = hax.dot(x, y, axis="inner")
    assert jnp.array_equal(product.array, jnp.full((2, 4), 3.0))


def test_symbolic_sizes_are_not_constant():
    (size,) = jax.export.symbolic_shape("n")
    assert jax.core.is_constant_dim(3)
    assert not jax.core.is_constant_dim(size)
    assert not jax.core.is_constant_dim(2 * size + 1)


def test_every_module_that_imports_haliax_gets_the_name():
    users = [path for path in SRC.rglob("*.py") if imported_modules(path, "haliax")]
    assert len(users) > 5
    needed = SRC / "sophia_levanter" / "jax_compatibility.py"
    assert [path.name for path in users if needed not in reached_from(path, set())] == []
