"""Where arrays lie on the devices."""

from types import SimpleNamespace

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from sophia_levanter.batch import batch_from_sequences
from sophia_levanter.config.mesh import MeshConfig
from sophia_levanter.partition.mesh import arranged, by_row_shard, gather_params, partition_of, row_shards, shard_params

ROWS = ("replica", "data")


def test_a_batch_is_spread_and_all_else_is_everywhere():
    partition = partition_of()
    batch = partition.place(batch_from_sequences(np.zeros((16, 5), np.int32), num_microbatches=2))
    assert batch.tokens.array.sharding.spec == PartitionSpec(None, ROWS, ("sequence",))
    assert {s.data.shape for s in batch.tokens.array.addressable_shards} == {(2, 1, 4)}
    weight = partition.place(hax.zeros(hax.make_axes(embed=8)))
    assert weight.array.sharding.is_fully_replicated
    assert partition.place({"step": jnp.zeros(())})["step"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("settings", "shard"),
    [
        ({}, (8, 16)),
        ({"fsdp": "embed"}, (1, 16)),
        ({"model": 4}, (8, 4)),
        ({"model": 4, "fsdp": "embed"}, (4, 4)),
        ({"model": 4, "fsdp": "mlp"}, (8, 2)),
        ({"model": 4, "mlp": None}, (8, 16)),
        ({"replica": 2, "model": 2, "fsdp": "embed"}, (4, 8)),
    ],
)
def test_parameters_at_rest_and_in_use(settings, shard):
    partition = partition_of(MeshConfig(**settings))

    def make():
        return hax.named(jnp.arange(128.0).reshape(8, 16), ("embed", "mlp"))

    def shards(x):
        return {s.data.shape for s in x.array.addressable_shards}

    placed, made = partition.place(make()), partition.init_sharded(make)
    assert shards(placed) == shards(made) == {shard}
    np.testing.assert_array_equal(placed.array, made.array)
    with partition.active():
        # Functions of their own, since jax keeps what it traced by function and mesh, whatever the axes.
        used = eqx.filter_jit(lambda x: gather_params(x))(placed)
        gradient = eqx.filter_jit(eqx.filter_grad(lambda x: hax.sum(hax.square(gather_params(x))).scalar()))(placed)
        again = eqx.filter_jit(lambda x: shard_params(x))(used)
    mlp = 16 // partition.mesh.shape["model"] if settings.get("mlp", "model") else 16
    assert shards(used) == {(8, mlp)}
    assert shards(gradient) == shards(again) == {shard}
    np.testing.assert_array_equal(gradient.array, 2 * placed.array)


@pytest.mark.parametrize(
    ("settings", "shape", "shard"),
    [
        ({}, (16, 5, 5), (2, 5, 5)),
        ({}, (12, 16, 16), (12, 2, 16)),
        ({"data": 4, "model": 2}, (12, 16, 16), (3, 16, 16)),
        ({"data": 4, "replica": 2}, (3, 8, 8), (3, 2, 8)),
        ({"data": 1, "model": 8}, (16, 8, 8), (16, 8, 8)),
        ({}, (12, 5, 5), (12, 5, 5)),
        ({}, (16, 8, 4), (16, 8, 4)),
        ({}, (16, 16), (16, 16)),
        ({}, (16,), (16,)),
    ],
)
def test_stacks_of_square_matrices_are_split_and_other_plain_arrays_are_not(settings, shape, shard):
    partition = partition_of(MeshConfig(**settings))

    def make():
        return jnp.arange(np.prod(shape)).reshape(shape)

    with partition.active():
        arrays = partition.place(make()), partition.init_sharded(make), jax.jit(shard_params)(make())
    for x in arrays:
        assert {s.data.shape for s in x.addressable_shards} == {shard}
        assert x.sharding.is_equivalent_to(partition.abstract(make).sharding, len(shape))
        np.testing.assert_array_equal(x, make())


def test_forward_over_reverse_goes_through_parameters_in_use():
    partition = partition_of(MeshConfig(fsdp="embed"))
    x, u = (partition.place(hax.named(jnp.arange(8.0) + i, "embed")) for i in range(2))

    def gradient(x):
        return eqx.filter_grad(lambda x: hax.sum(gather_params(x) ** 3).scalar())(x)

    with partition.active():
        _, product = jax.jit(lambda x, u: jax.jvp(gradient, (x,), (u,)))(x, u)
    np.testing.assert_allclose(product.array, 6 * x.array * u.array)


def test_row_shards():
    x = {"x": jnp.zeros((8, 3))}
    assert row_shards() == 1
    assert by_row_shard(x) is x
    partition = partition_of(MeshConfig(replica=2, model=2))
    with partition.active():
        assert row_shards() == 4
        spread = jax.jit(by_row_shard)({"x": jnp.zeros((4, 3))})["x"]
    assert {s.data.shape for s in spread.addressable_shards} == {(1, 3)}


def test_replicas_are_the_slices_of_a_multi_slice_machine(monkeypatch):
    """Slow links lie between replicas only."""

    class Chip(SimpleNamespace):
        def __hash__(self):
            return self.id

    chips = [
        Chip(
            id=i,
            slice_index=i % 2,
            process_index=i % 2,
            platform="tpu",
            device_kind="x",
            coords=(i // 2, 0, 0),
            core_on_chip=0,
        )
        for i in range(8)
    ]
    mesh = arranged((2, 2, 1, 2), chips)
    assert mesh.shape == (2, 2, 1, 2)
    assert [{chip.slice_index for chip in replica.flat} for replica in mesh] == [{0}, {1}]


def test_abstract_is_what_place_gives():
    partition = partition_of()

    def make():
        return {"x": hax.zeros(hax.make_axes(batch=8, embed=3)), "n": jnp.zeros((), jnp.int32)}

    there, described = partition.place(make()), partition.abstract(make)
    assert jax.tree.structure(there) == jax.tree.structure(described)
    for real, shape in zip(jax.tree.leaves(there), jax.tree.leaves(described), strict=True):
        assert (real.shape, real.dtype, real.sharding) == (shape.shape, shape.dtype, shape.sharding)
    assert isinstance(jax.tree.leaves(described)[0], jax.ShapeDtypeStruct)


def test_what_an_optimizer_masked_stays():
    """optax puts MaskedNodes where Muon's matrices are in Adam's state, in a NamedArray too."""
    axes = hax.make_axes(batch=8, embed=3)

    def make():
        return {"adam": hax.NamedArray(optax.MaskedNode(), axes), "muon": hax.zeros(axes)}

    there, described = partition_of().place(make()), partition_of().abstract(make)
    assert jax.tree.structure(there) == jax.tree.structure(described)
    assert len(jax.tree.leaves(described)) == 1
