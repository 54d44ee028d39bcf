import doctest
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import sophia_levanter.optim

HEAVY = ("haliax", "draccus", "orbax", "ray", "datasets", "wandb", "grain", "tensorstore", "rich", "jmp", "tokenizers")


def test_imports_jax_equinox_optax_and_jaxtyping_only():
    program = f"""
import sys
import sophia_levanter.optim
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(*sorted(loaded & set({HEAVY})))
print(*sorted(name for name in sys.modules if name.startswith("sophia_levanter")))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy, own = result.stdout.splitlines()
    assert heavy == ""
    assert all(name == "sophia_levanter" or name.startswith("sophia_levanter.optim") for name in own.split())


def test_public_names_exist():
    names = {"AdamW", "Lion", "Muon", "Soap", "Sophia", "SophiaG", "SophiaH", "sophia_g"}
    assert names <= set(sophia_levanter.optim.__all__)
    assert all(hasattr(sophia_levanter.optim, name) for name in sophia_levanter.optim.__all__)


PUBLIC = {name: getattr(sophia_levanter.optim, name) for name in sophia_levanter.optim.__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings(name):
    names = PUBLIC | {"eqx": eqx, "jax": jax, "jnp": jnp, "optax": optax}
    for test in doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=names):
        assert doctest.DocTestRunner().run(test).failed == 0
