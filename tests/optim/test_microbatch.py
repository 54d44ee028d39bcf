import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sophia_levanter.optim import split_microbatches
from sophia_levanter.optim._gradients import num_microbatches, sum_over_microbatches

ROWS = np.arange(24, dtype=np.float32).reshape(12, 2)


def test_rows_keep_their_order():
    batch = {"x": ROWS, "y": jnp.arange(12), "named": hax.named(ROWS, ("batch", "feature")), "nothing": None}
    split, share = split_microbatches(batch, 4)
    assert share == 1
    np.testing.assert_array_equal(split["x"], ROWS.reshape(3, 4, 2))
    np.testing.assert_array_equal(split["y"], np.arange(12).reshape(3, 4))
    assert [(axis.name, axis.size) for axis in split["named"].axes] == [("microbatch", 3), ("batch", 4), ("feature", 2)]
    np.testing.assert_array_equal(split["named"].array, ROWS.reshape(3, 4, 2))
    assert split["nothing"] is None


@pytest.mark.parametrize(
    ("size", "fraction", "used", "share"),
    [
        (2, 0.5, 3, 0.5),
        (2, 0.4, 2, 1 / 3),
        (2, 0.45, 3, 0.5),
        (2, 0.01, 1, 1 / 6),
        (2, 0.99, 6, 1),
        (4, 0.6, 2, 2 / 3),
        (12, 0.1, 1, 1),
        (1, 1 / 12, 1, 1 / 12),
        (6, np.float32(0.5), 1, 0.5),
    ],
)
def test_the_first_whole_microbatches_nearest_to_the_fraction(size, fraction, used, share):
    for batch in (ROWS, hax.named(ROWS, ("batch", "feature"))):
        split, in_effect = split_microbatches(batch, size, fraction=fraction)
        array = split if batch is ROWS else split.array
        assert in_effect == pytest.approx(share)
        np.testing.assert_array_equal(array, ROWS[: used * size].reshape(used, size, 2))


def test_under_jit():
    split = jax.jit(lambda batch: split_microbatches(batch, 3, fraction=0.5)[0])(ROWS)
    np.testing.assert_array_equal(split, ROWS[:6].reshape(2, 3, 2))


@pytest.mark.parametrize(
    ("batch", "settings", "message"),
    [
        (ROWS, {"microbatch_size": 5}, "microbatch_size is 5; it must divide the 12 rows"),
        (ROWS, {"microbatch_size": 0}, "microbatch_size is 0; it must be an integer of at least 1"),
        (ROWS, {"microbatch_size": 2.0}, "microbatch_size is 2.0; it must be an integer"),
        (ROWS, {"microbatch_size": 2, "fraction": 0}, r"fraction is 0; it must be in \(0, 1\]"),
        (ROWS, {"microbatch_size": 2, "fraction": 1.5}, r"fraction is 1.5; it must be in \(0, 1\]"),
        (ROWS, {"microbatch_size": 2, "fraction": np.nan}, r"fraction is nan; it must be in \(0, 1\]"),
        ({"x": ROWS, "y": ROWS[:4]}, {"microbatch_size": 2}, r"\[4, 12\] rows; all must have the same number of rows"),
        ({"x": ROWS, "n": np.int32(3)}, {"microbatch_size": 2}, "the batch contains a scalar"),
        (hax.named(jnp.float32(3), ()), {"microbatch_size": 2}, "the batch contains a scalar"),
        ({}, {"microbatch_size": 2}, "batch .* array"),
        (ROWS[:0], {"microbatch_size": 2}, "batch .* rows"),
    ],
)
def test_what_does_not_fit_is_refused(batch, settings, message):
    with pytest.raises(ValueError, match=message):
        split_microbatches(batch, **settings)


def test_the_number_of_microbatches():
    assert num_microbatches({"x": np.zeros((3, 2)), "named": hax.named(np.zeros((3, 5)), ("microbatch", "row"))}) == 3
    with pytest.raises(ValueError, match=r"microbatches has arrays with \[2, 3\] microbatches"):
        num_microbatches([np.zeros(2), np.zeros(3)])
    for empty in ({}, np.zeros((0, 4))):
        with pytest.raises(ValueError, match=r"microbatches (contains no|has) arrays"):
            num_microbatches(empty)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("library", [np, jnp])
def test_the_sum_over_microbatches(count, library):
    plain = library.asarray(ROWS[:count])
    tree = {"plain": plain, "named": hax.named(jnp.asarray(ROWS[:count]), ("microbatch", "feature"))}

    def function(part, index):
        assert [axis.name for axis in part["named"].axes] == ["feature"]
        return {"sum": part["plain"] + 2 * part["named"].array, "index": jnp.asarray(index, jnp.int32)}

    summed = sum_over_microbatches(function, tree)
    np.testing.assert_array_equal(summed["sum"], 3 * ROWS[:count].sum(0))
    assert (int(summed["index"]), summed["index"].dtype) == (sum(range(count)), jnp.int32)


def test_keys_are_microbatches_too():
    keys = jax.random.split(jax.random.key(0), 3)
    summed = sum_over_microbatches(lambda key, _: jax.random.uniform(key), keys)
    np.testing.assert_allclose(summed, sum(jax.random.uniform(key) for key in keys), rtol=1e-6)
    legacy = jax.random.split(jax.random.PRNGKey(0), 3)
    np.testing.assert_allclose(
        sum_over_microbatches(lambda key, _: jax.random.uniform(key), legacy),
        sum(jax.random.uniform(key) for key in legacy),
        rtol=1e-6,
    )


def test_one_microbatch_exists_at_a_time():
    """The function is traced once for all microbatches, in a scan."""
    jaxpr = jax.make_jaxpr(lambda x: sum_over_microbatches(lambda part, _: jnp.sin(part), x))(ROWS)
    (scan,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    assert scan.params["length"] == 12
    assert str(jaxpr).count(" sin ") == 1
