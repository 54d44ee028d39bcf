"""The names of jax that are defined for haliax, and when they can go; libtpu on machines without a TPU."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import haliax as hax
import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax._src import hardware_utils

from pages import ROOT
from sophia_levanter import jax_compatibility

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


@pytest.mark.parametrize(
    ("attached", "platforms", "skipped"),
    [(0, None, True), (0, "", True), (4, None, False), (4, "tpu,cpu", False), (0, "tpu", False)],
)
def test_a_tpu_is_skipped_only_where_none_can_be(attached, platforms, skipped, monkeypatch):
    replaced = []
    hardware = SimpleNamespace(num_available_tpu_chips_and_device_id=lambda: (attached, None))
    monkeypatch.setattr(jax_compatibility, "hardware_utils", hardware)
    monkeypatch.setattr(jax_compatibility, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms)))
    monkeypatch.setattr(jax_compatibility, "register_backend_factory", lambda name, *_, **__: replaced.append(name))
    jax_compatibility.skip_absent_tpu()
    assert replaced == ["tpu"] * skipped
    replaced.clear()
    monkeypatch.setenv("JAX_FORCE_TPU_INIT", "1")
    jax_compatibility.skip_absent_tpu()
    assert replaced == []


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra tpu")
@pytest.mark.skipif(hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0, reason="this machine has a TPU")
def test_libtpu_prints_nothing_where_no_tpu_is():
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    program = "import jax, sophia_levanter.batch; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("cpu", "gpu")
    assert not re.search("tpu|InitGoogle", done.stderr, re.IGNORECASE), done.stderr
