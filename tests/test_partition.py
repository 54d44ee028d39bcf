"""Where arrays lie on the devices."""

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from sophia_levanter.batch import batch_from_windows
from sophia_levanter.errors import InputError
from sophia_levanter.partition import abstract, check_batch_divides, data_mesh, place


def test_a_batch_is_spread_and_all_else_is_everywhere():
    mesh = data_mesh()
    batch = place(batch_from_windows(np.zeros((16, 5), np.int32), num_microbatches=2), mesh)
    assert batch.tokens.array.sharding.spec == PartitionSpec(None, "data", None)
    assert {s.data.shape for s in batch.tokens.array.addressable_shards} == {(2, 1, 4)}
    weight = place(hax.zeros(hax.make_axes(embed=8)), mesh)
    assert weight.array.sharding.is_fully_replicated
    assert place({"step": jnp.zeros(())}, mesh)["step"].sharding.is_fully_replicated


def test_abstract_is_what_place_gives():
    mesh = data_mesh()

    def make():
        return {"x": hax.zeros(hax.make_axes(batch=8, embed=3)), "n": jnp.zeros((), jnp.int32)}

    there, described = place(make(), mesh), abstract(make, mesh)
    assert jax.tree.structure(there) == jax.tree.structure(described)
    for real, shape in zip(jax.tree.leaves(there), jax.tree.leaves(described), strict=True):
        assert (real.shape, real.dtype, real.sharding) == (shape.shape, shape.dtype, shape.sharding)
    assert isinstance(jax.tree.leaves(described)[0], jax.ShapeDtypeStruct)


def test_what_an_optimizer_masked_stays():
    """optax puts MaskedNodes where Muon's matrices are in Adam's state, in a NamedArray too."""
    axes = hax.make_axes(batch=8, embed=3)

    def make():
        return {"adam": hax.NamedArray(optax.MaskedNode(), axes), "muon": hax.zeros(axes)}

    there, described = place(make(), data_mesh()), abstract(make, data_mesh())
    assert jax.tree.structure(there) == jax.tree.structure(described)
    assert len(jax.tree.leaves(described)) == 1


def test_rows_must_divide_over_the_devices():
    check_batch_divides("trainer.microbatch_size", 16, data_mesh())
    with pytest.raises(InputError, match=r"microbatch_size 12 does not divide over 8 devices; .* such as 16 would"):
        check_batch_divides("trainer.microbatch_size", 12, data_mesh())
