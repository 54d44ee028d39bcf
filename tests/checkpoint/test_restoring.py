"""What is saved comes back bit for bit, and a checkpoint of another model does not."""

import hashlib
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import bits, blank, make_model, make_state, one_line, put, silent

from sophia_levanter.checkpoint import Retention, remove_leftovers, restore, save, steps
from sophia_levanter.errors import InputError


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    state = make_state()
    folder = save(
        tmp_path / "run" / "checkpoints",
        10,
        state,
        run_id="abc",
        metadata={"best": [1.5, None]},
        retention=Retention(1),
    )
    assert folder == str(tmp_path / "run" / "checkpoints" / "step-00000010")

    like = blank(state)
    assert bits(like) != bits(state)
    restored = restore(tmp_path / "run" / "checkpoints", like, report=silent)
    assert (restored.step, restored.run_id, restored.metadata) == (10, "abc", {"best": [1.5, None]})
    assert bits(restored.tree) == bits(state)
    assert jax.tree.structure(restored.tree) == jax.tree.structure(state)
    assert isinstance(restored.tree.optimizer[1][2], np.ndarray)


def test_leaves_that_are_no_arrays_come_from_like(tmp_path: Path) -> None:
    put(tmp_path, 1, make_model())
    like = eqx.tree_at(lambda m: m.dropout, make_model(1, activation=jax.nn.relu), 0.7)
    model = restore(tmp_path, like, report=silent).tree
    assert (model.activation, model.dropout) == (jax.nn.relu, 0.7)
    assert bits(model) == bits(make_model())


def test_like_may_be_abstract_and_uncommitted_arrays_stay_so(tmp_path: Path) -> None:
    state = {"model": make_model(), "here": jax.device_put(jnp.ones(3), jax.devices()[0])}
    put(tmp_path, 1, state)
    abstract = restore(tmp_path, eqx.filter_eval_shape(lambda: state), report=silent).tree
    assert bits(abstract) == bits(state)
    concrete = restore(tmp_path, state, report=silent).tree
    assert concrete["here"].committed
    assert not concrete["model"].scale.committed


@pytest.mark.parametrize("saved", [None, 7])
def test_a_scalar_that_was_added_later(saved: int | None, tmp_path: Path) -> None:
    put(tmp_path, 1, {"w": jnp.ones(3)} | ({} if saved is None else {"count": jnp.int32(saved)}))
    like = {"w": jnp.zeros(3), "count": jnp.int32(5)}
    restored = restore(tmp_path, like, report=silent, added={"count": 2, "other": 1}).tree
    assert (int(restored["count"]), restored["count"].dtype) == (2 if saved is None else saved, jnp.int32)
    assert restored["w"].all()
    with pytest.raises(InputError, match=r"leaf more is missing in the checkpoint"):
        restore(tmp_path, like | {"more": jnp.int32(0)}, report=silent, added={"count": 2})


def test_float64(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        tree = {"w": jnp.array([1 / 3, jnp.pi])}
        assert tree["w"].dtype == jnp.float64
        put(tmp_path, 1, tree)
        assert bits(restore(tmp_path, tree, report=silent).tree) == bits(tree)
    with pytest.raises(InputError, match=r"leaf w is float64.*jax_enable_x64"):
        restore(tmp_path, {"w": jax.ShapeDtypeStruct((2,), np.dtype("float64"))}, report=silent)


def test_numpy_arrays_of_any_layout(tmp_path: Path) -> None:
    tree = {
        "F": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(10)[::3],
        "big": np.ones(2, ">f4"),
    }
    put(tmp_path, 1, tree)
    found = restore(tmp_path, tree, report=silent).tree
    assert all(np.array_equal(found[name], tree[name]) for name in tree)


def test_manifest_names_and_describes_each_leaf(tmp_path: Path) -> None:
    folder = put(tmp_path, 7, {"model": make_model()})
    manifest = json.loads((folder / "manifest.json").read_text())
    described = {array["path"]: (array["dtype"], array["shape"]) for array in manifest["arrays"]}
    assert described == {
        "model.up.weight": ("float32", [4, 6]),
        "model.up.bias": ("float32", [4]),
        "model.scale": ("bfloat16", [4]),
    }
    assert (manifest["format"], manifest["step"], manifest["run_id"], manifest["metadata"]) == (
        2,
        7,
        "run",
        {"seed": 7},
    )


def test_ambiguous_names_and_random_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two leaves .* named a\.b"):
        put(tmp_path, 1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    with pytest.raises(TypeError, match=r"leaf key .*key_data"):
        put(tmp_path, 1, {"key": jax.random.key(0)})
    with pytest.raises(TypeError, match="leaf words"):
        put(tmp_path, 1, {"words": np.array(["a"])})
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        assert steps(directory) == []
        with pytest.raises(InputError, match="contains no checkpoint"):
            restore(directory, make_state(), report=silent)
    remove_leftovers(tmp_path / "absent")


SAVED = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (SAVED | {"w": jnp.ones((2, 4))}, "leaf w is float32[2, 3] in the checkpoint but float32[2, 4] "),
        (SAVED | {"b": jnp.ones(3, jnp.bfloat16)}, "leaf b is float32[3] in the checkpoint but bfloat16[3] "),
        ({"w": jnp.ones((2, 3))}, "leaf b is float32[3] in the checkpoint but missing "),
        (SAVED | {"c": jnp.ones(())}, "leaf c is missing in the checkpoint but float32[] "),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path: Path, like: Any, message: str) -> None:
    for step in (1, 2):
        put(tmp_path, step, SAVED)
    with pytest.raises(InputError) as error:
        restore(tmp_path, like, report=silent)
    assert message in one_line(error)
    assert "step-00000002" in one_line(error)


def test_a_later_format_is_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1, make_state())
    with monkeypatch.context() as patch:
        patch.setattr("sophia_levanter.checkpoint.manifest.FORMAT", 3)
        put(tmp_path, 2, make_state())
    with pytest.raises(InputError, match="not in format 2"):
        restore(tmp_path, make_state(), report=silent)


def test_a_cast_only_when_asked(tmp_path: Path) -> None:
    tree = {"w": jnp.array([1.0, 1 / 3, jnp.inf]), "n": jnp.arange(3)}
    put(tmp_path, 1, tree)
    half = {"w": jnp.zeros(3, jnp.bfloat16), "n": jnp.arange(3)}
    with pytest.raises(InputError, match=r"leaf w is float32\[3\] in the checkpoint but bfloat16\[3\] in this run"):
        restore(tmp_path, half, report=silent)
    found = restore(tmp_path, half, report=silent, cast=True).tree
    assert bits(found) == bits({"w": tree["w"].astype(jnp.bfloat16), "n": tree["n"]})
    with pytest.raises(InputError, match=r"leaf n is int32\[3\] in the checkpoint but float32\[3\] in this run"):
        restore(tmp_path, half | {"n": jnp.zeros(3)}, report=silent, cast=True)


def test_format_1_says_what_to_do(tmp_path: Path) -> None:
    """Its manifest, whole: not damage, which would be passed over."""
    put(tmp_path, 1, make_state())
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    body = {"format": 1, "run_id": "r", "step": 2, "metadata": {}, "arrays": []}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"digest": digest, **body}, indent=1))
    with pytest.raises(InputError, match="is not in format 2; read it with the version"):
        restore(tmp_path, make_state(), report=silent)
