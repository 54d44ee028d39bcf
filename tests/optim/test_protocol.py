"""The public interface: imports, names, examples, and what every optimizer does, whatever its algorithm."""

import doctest
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sophia_levanter.optim
from sophia_levanter.optim import AdamW, AdEMAMix, Lion, Muon, Optimizer, Soap, Sophia, SophiaG, SophiaH
from sophia_levanter.optim._checks import value_at

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
    names = "AdamW AdEMAMix CautiousWeightDecay Hyperball Lion Muon Soap Sophia SophiaG SophiaH sophia_g"
    assert set(names.split()) <= set(PUBLIC)


PUBLIC = {name: getattr(sophia_levanter.optim, name) for name in sophia_levanter.optim.__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings(name):
    names = PUBLIC | {"eqx": eqx, "jax": jax, "jnp": jnp, "optax": optax}
    for test in doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=names):
        assert doctest.DocTestRunner().run(test).failed == 0


PARAMS = {"w": jnp.ones(2), "b": jnp.ones(3)}


@pytest.mark.parametrize("cls", [Sophia, SophiaG, SophiaH, AdamW, Lion, Muon, Soap, AdEMAMix])
def test_every_optimizer_can_be_driven_by_the_protocol_alone(cls):
    optimizer: Optimizer = cls(learning_rate=0.1)
    params = {"w": jnp.asarray([1.0, -2.0])}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    updates, state = update(params, state, params, finite=jnp.asarray(True))
    assert (np.sign(updates["w"]) == [-1, 1]).all()
    skipped, after = update(params, state, params, finite=jnp.asarray(False))
    assert skipped["w"].tolist() == [0, 0]
    assert value_at("learning_rate", optimizer.learning_rate, jnp.int32(0)) == 0.1
    assert optimizer.refresh_due(0) in (True, False)
    metrics = optimizer.metrics(state)
    assert all(value.shape == () for value in metrics.values())
    assert metrics["momentum_norm"] == optimizer.metrics(after)["momentum_norm"] > 0


# Sophia and the baselines, which inherit `init` and `update`, have each of the following checks once.


def test_a_gradient_transformation_comes_first():
    """Clipped inside is clipped by hand. `test_sophia.py` and `test_optax.py` have the same of Sophia."""
    clip = optax.clip_by_global_norm(0.5)
    inside, outside = AdamW(0.1, gradient_transform=clip), AdamW(0.1)
    params = {"w": jnp.asarray([1.0, -2.0])}
    ours, theirs = inside.init(params), outside.init(params)
    for scale in (10.0, 0.1, 3.0):
        grads = {"w": scale * jnp.asarray([0.6, 0.8])}
        clipped, _ = clip.update(grads, clip.init(params))
        updates, ours = inside.update(grads, ours, params)
        wanted, theirs = outside.update(clipped, theirs, params)
        np.testing.assert_array_equal(updates["w"], wanted["w"])
        assert inside.metrics(ours) == outside.metrics(theirs)
    assert not np.array_equal(inside.metrics(ours)["momentum_norm"], 0)


@pytest.mark.parametrize("cls", [SophiaG, AdamW])
def test_models_that_cannot_be_optimized(cls):
    with pytest.raises(ValueError, match="the model has no floating-point array to optimize"):
        cls().init({"steps": jnp.int32(1)})
    with pytest.raises(TypeError, match=r"^model\['z'\] is complex \(complex64\)"):
        cls().init({"w": jnp.ones(1), "z": jnp.ones(1, jnp.complex64)})


@pytest.mark.parametrize("cls", [SophiaG, AdamW])
def test_other_trees_are_named_by_their_path(cls):
    optimizer = cls()
    with pytest.raises(ValueError, match=r"grads\['b'\] is missing, but the parameter has shape \(3,\)"):
        optimizer.update({"w": jnp.ones(2)}, optimizer.init(PARAMS), PARAMS)
    with pytest.raises(
        ValueError, match=r"weight_decay_mask does not match the parameters: it has no entry for \['b'\]"
    ):
        masked = cls(weight_decay_mask={"w": True})
        masked.update(PARAMS, masked.init(PARAMS), PARAMS)


@pytest.mark.parametrize("cls", [SophiaG, AdamW])
@pytest.mark.parametrize(
    ("state", "finite", "message"),
    [
        *((None, finite, "^finite ") for finite in (1, "yes", jnp.asarray(1), jnp.ones(2, bool))),
        ({}, None, r"^state is a .*; it must be the result of init\(model\)"),
        (optax.adam(0.1).init(PARAMS), None, r"^state is a .*; it must be the result of init\(model\)"),
    ],
)
def test_a_state_or_flag_of_another_kind_is_refused(cls, state, finite, message):
    optimizer = cls()
    with pytest.raises(TypeError, match=message):
        optimizer.update(PARAMS, optimizer.init(PARAMS) if state is None else state, PARAMS, finite=finite)


@pytest.mark.parametrize("cls", [SophiaG, AdamW])
@pytest.mark.parametrize("value", [1.0, optax.clip_by_global_norm, optax.GradientTransformation, SophiaH()])
def test_a_gradient_transform_of_another_kind_is_refused(cls, value):
    with pytest.raises(TypeError, match=r"^gradient_transform is "):
        cls(gradient_transform=value)
