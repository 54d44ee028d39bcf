"""Gradients and curvature of a batch, for the trainer and `value_grad_and_curvature`.

Only the activations of one microbatch are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from sophia_levanter.optim._checks import check_count, check_key, check_parameters, check_scalars, whole_number
from sophia_levanter.optim._trees import all_finite, is_named, trainable, upcast, wide_dtype


def split_microbatches(batch: PyTree, microbatch_size: int, *, fraction: float = 1.0) -> tuple[PyTree, float]:
    """Split the first part of a batch into microbatches, for an estimator or `value_grad_and_curvature`.

    Args:
        batch: any pytree of arrays or NamedArrays whose first axis is the row axis, with the same size in all of them.
        microbatch_size: number of rows in a microbatch; it must divide the number of rows in the batch.
        fraction: the fraction of the batch to keep, in (0, 1], rounded to whole microbatches (at least one).

    Returns:
        The same tree with arrays [microbatch, row, ...], and the fraction of the batch that it contains. To use several
        devices, shard the rows.

    Raises:
        ValueError: if the sizes do not divide evenly, or the fraction is out of range.

    Examples:
        >>> microbatches, share = split_microbatches({"x": jnp.zeros((8, 3))}, 2, fraction=0.5)
        >>> microbatches["x"].shape, share
        ((2, 2, 3), 0.5)
    """
    microbatch_size = whole_number(microbatch_size)
    check_count("microbatch_size", microbatch_size)
    if not isinstance(fraction, Real) or not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}; it must be in (0, 1]")
    rows = _common_length("the batch", batch, "rows")
    if rows % microbatch_size:
        raise ValueError(f"microbatch_size is {microbatch_size}; it must divide the {rows} rows in the batch")
    whole = rows // microbatch_size
    used = max(1, round(fraction * whole))

    def split(x: Any) -> Any:
        if not is_named(x):
            return jnp.asarray(x)[: used * microbatch_size].reshape(used, microbatch_size, *jnp.shape(x)[1:])
        row = x.axes[0]
        axes = type(row)("microbatch", used), row.resize(microbatch_size)
        return x[{row.name: slice(0, used * microbatch_size)}].unflatten_axis(row.name, axes)

    return jax.tree.map(split, batch, is_leaf=is_named), used / whole


def num_microbatches(microbatches: PyTree) -> int:
    """Return the size of the first axis. Raise a ValueError if it differs between arrays, or there are no arrays."""
    return _common_length("microbatches", microbatches, "microbatches")


def split_at(microbatches: PyTree, first: int) -> tuple[PyTree, PyTree | None]:
    """Split the microbatches in two at index `first`; the second part is None if it would be empty."""

    def part(where: slice) -> PyTree:
        return jax.tree.map(lambda x: _at(x, where), microbatches, is_leaf=is_named)

    total = num_microbatches(microbatches)
    return part(slice(0, first)), part(slice(first, total)) if first < total else None


def sum_over_microbatches(
    function: Callable[[PyTree, Any], PyTree], microbatches: PyTree, start: PyTree | None = None
) -> PyTree:
    """Sum `function(microbatch, index)` over the first axis with `lax.scan`, starting from `start` or from zeros."""

    def at(index: Any) -> PyTree:
        return function(jax.tree.map(lambda x: _at(x, index), microbatches, is_leaf=is_named), index)

    count = num_microbatches(microbatches)
    if count == 1:
        return at(0) if start is None else jax.tree.map(jnp.add, start, at(0))
    if start is None:
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(at, 0))
    summed, _ = jax.lax.scan(
        lambda carry, index: (jax.tree.map(jnp.add, carry, at(index)), None), start, jnp.arange(count)
    )
    return summed


def _at(x: Any, index: Any) -> Any:
    if is_named(x):
        return x[{x.axes[0].name: index}]
    # A NumPy array cannot be indexed with a tracer.
    return (x if isinstance(x, jax.Array) else jnp.asarray(x))[index]


def _common_length(name: str, tree: PyTree, things: str) -> int:
    lengths = set()
    for x in jax.tree.leaves(tree, is_leaf=is_named):
        shape = [axis.size for axis in x.axes] if is_named(x) else jnp.shape(x)
        if not shape:
            raise ValueError(
                f"{name} contains a scalar; the first axis of every array must be the row or microbatch axis"
            )
        lengths.add(shape[0])
    if not lengths:
        raise ValueError(f"{name} contains no arrays; for a single pass, omit microbatches")
    if len(lengths) > 1:
        raise ValueError(
            f"{name} has arrays with {sorted(lengths)} {things}; all must have the same number of {things}"
        )
    if lengths == {0}:
        raise ValueError(f"{name} has arrays with 0 {things}; at least one is required")
    return lengths.pop()


# (model, microbatch, key) -> mean loss, mean loss on sampled targets, number of targets. The losses are means to avoid
# overflow in half precision; `accumulate` multiplies them by the number of targets.
LossesFn = Callable[..., tuple[Any, Any, Any]]


class GradientSums(NamedTuple):
    """Loss, gradient and curvature, summed over targets.

    Attributes:
        loss: the summed loss.
        num_targets: the number of targets, or their total weight.
        grads: the gradient, structured like the trainable part of the model, in float32 or wider; None if not computed.
        curvature: the sum of the results of the estimator's `accumulated` method; None without an estimator.
    """

    loss: Float[Array, ""]
    num_targets: Float[Array, ""]
    grads: PyTree | None
    curvature: PyTree | None

    def mean(self) -> tuple[Float[Array, ""], PyTree]:
        """Return the mean loss and its gradient."""
        return self.loss / self.num_targets, jax.tree.map(lambda g: g / self.num_targets, self.grads)


def accumulate(
    losses_fn: LossesFn,
    model: PyTree,
    microbatches: PyTree = None,
    *,
    key: Key[Array, ""],
    estimator: Any = None,
    gradient: bool = True,
    start: GradientSums | None = None,
) -> GradientSums:
    """Sum the loss, gradient and curvature over microbatches, one at a time.

    Args:
        losses_fn, model, microbatches, key: as for `value_grad_and_curvature`.
        estimator: computes the curvature term of a microbatch with `accumulated`; None for no curvature.
        gradient: whether to compute the gradient of the loss on the true targets.
        start: sums over other microbatches, to which the new sums are added.
    """
    check_parameters(model)
    check_key(key)

    def losses(model: PyTree, *args: Any) -> list[Array]:
        what = ("a scalar mean loss", "a scalar mean loss on sampled targets", "the number of targets")
        return check_scalars("losses_fn", losses_fn(model, *args), what)

    def one(*args: Any) -> GradientSums:
        # Return only the losses to differentiate, so that no other backward pass is built.
        wanted = [0] if gradient else []
        if estimator is not None and not (gradient and not estimator.samples_targets):
            wanted.append(int(estimator.samples_targets))

        def differentiated(model: PyTree) -> tuple[list[Array], list[Array]]:
            found = losses(model, *args)
            return [found[which] for which in wanted], found

        results, pull, (loss, _, num_targets) = eqx.filter_vjp(differentiated, model, has_aux=True)
        n = jnp.asarray(num_targets, jnp.promote_types(loss.dtype, jnp.float32))

        def gradient_of(index: int) -> PyTree:
            """Return the gradient of a summed loss. In half precision, a cotangent n would be rounded or overflow."""
            cotangents = [jnp.zeros_like(result) for result in results]
            exact = results[index].dtype == n.dtype
            cotangents[index] = n if exact else jnp.ones_like(results[index])
            (found,) = pull(cotangents)
            return found if exact else jax.tree.map(lambda g: upcast(g) * n, found)

        grads = gradient_of(0) if gradient else None
        labelled = gradient_of(-1) if len(wanted) > int(gradient) else grads
        curvature = None if estimator is None else estimator.accumulated(labelled, n)
        return GradientSums(loss * n, n, jax.tree.map(upcast, grads), curvature)

    if microbatches is None:
        return one(key)
    return sum_over_microbatches(lambda part, index: one(part, jax.random.fold_in(key, index)), microbatches, start)


class RefreshStep(eqx.Module):
    """A step that refreshes the curvature. The estimator determines which passes are run.

    Attributes:
        losses_fn: as for `value_grad_and_curvature`.
        model: the model before the step.
        key: a JAX random key.
        batch: the microbatches [microbatch, ...] of the whole batch; None for a single pass.
        first: the microbatches [microbatch, ...] used to estimate the curvature.
        others: the remaining microbatches of the batch; None if `first` is not part of the batch.
        curvature_losses_fn: a version of `losses_fn` with a forward-mode derivative; None if `losses_fn` has one.
    """

    losses_fn: LossesFn
    model: PyTree
    key: Key[Array, ""]
    batch: PyTree
    first: PyTree
    others: tuple[PyTree, ...] | None = ()
    curvature_losses_fn: LossesFn | None = None

    def gradient(self) -> GradientSums:
        """Compute the loss and gradient over the whole batch."""
        return accumulate(self.losses_fn, self.model, self.batch, key=self.key)

    def shared_gradient(self, estimator: Any) -> tuple[GradientSums, PyTree]:
        """Compute the loss and gradient over the whole batch, and an estimate on `first`, in the same forward pass.

        Sampled targets require a second backward pass. If `first` is not part of the batch, a separate pass is run.

        Args:
            estimator: an estimator with `samples_targets`, `accumulated` and `finished`, such as `GaussNewtonBartlett`.
        """
        if self.others is None:
            _, h_hat = self._estimated(estimator, gradient=False)
            return self.gradient(), h_hat
        sums, h_hat = self._estimated(estimator, gradient=True)
        return self._with_others(sums), h_hat

    def replaced_gradient(self, estimator: Any) -> tuple[GradientSums, PyTree]:
        """Compute the gradient over `others`, and an estimate on `first`, with no more passes than an ordinary step.

        Raises:
            ValueError: if `others` is empty or None.
        """
        if not self.others:
            raise ValueError(
                "extra_pass is False, but no microbatch is left for the gradient; "
                "estimate the curvature on fewer microbatches than the batch has"
            )
        sums, h_hat = self._estimated(estimator, gradient=False)
        # If the estimate is not finite, initialize the gradient to nan, so that the step is skipped (_once_complete).
        zero = jnp.where(all_finite(h_hat), 0.0, jnp.nan)
        zeros = jax.tree.map(lambda p: jnp.full_like(p, zero, dtype=wide_dtype(p)), trainable(self.model))
        nothing = GradientSums(jnp.zeros_like(sums.loss), jnp.zeros_like(sums.num_targets), zeros, None)
        return self._with_others(nothing), h_hat

    def curvature_pass(self, after: GradientSums) -> tuple[Callable[..., tuple[Array, Array]], PyTree]:
        """Return a loss and microbatches for a separate pass over `first`, which starts once `after` is complete.

        Returns:
            A function (model, microbatch) -> (scalar mean loss, number of targets) with a forward-mode derivative, and
            the microbatches. For a single pass, the function takes only the model, and the microbatches are None.
        """
        losses_fn = self.curvature_losses_fn or self.losses_fn
        # Estimators draw the probe from `key`, so use a different key to make dropout independent of the probe.
        key = jax.random.fold_in(self.key, 0)

        def loss_fn(model: PyTree, *microbatch: Any) -> tuple[Array, Array]:
            args: tuple = (key,)
            for part, index in microbatch:
                args = (part, jax.random.fold_in(key, index))
            loss, _, num_targets = losses_fn(model, *args)
            return loss, num_targets

        if self.first is None:
            return loss_fn, None
        return loss_fn, (_once_complete(after, self.first), jnp.arange(num_microbatches(self.first)))

    def _estimated(self, estimator: Any, *, gradient: bool) -> tuple[GradientSums, PyTree]:
        """Compute the sums over `first` without the curvature, and the estimate."""
        sums = accumulate(self.losses_fn, self.model, self.first, key=self.key, estimator=estimator, gradient=gradient)
        return sums._replace(curvature=None), estimator.finished(sums.curvature, sums.num_targets)

    def _with_others(self, sums: GradientSums) -> GradientSums:
        for index, part in enumerate(self.others or ()):
            key = jax.random.fold_in(self.key, num_microbatches(self.first) + index)
            sums = accumulate(self.losses_fn, self.model, _once_complete(sums, part), key=key, start=sums)
        return sums


def _once_complete(sums: GradientSums, microbatches: PyTree) -> PyTree:
    """Make the microbatches depend on the sums, so that a pass over them starts only once the sums are complete.

    Two concurrent passes would use the memory of both. On CPUs they may deadlock, because devices enter the collectives
    of independent passes in different orders. If the gradient is not finite, the microbatches are replaced by zeros:
    the step is skipped anyway. Its reported loss comes from the earlier pass; without true targets there, it is nan.
    """
    finite = all_finite(sums.grads)

    def wait(x: Any) -> Any:
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        return x if is_key else jnp.where(finite, x, jnp.zeros_like(x))

    return jax.tree.map(wait, microbatches)


def value_grad_and_curvature(
    losses_fn: LossesFn,
    model: PyTree,
    microbatches: PyTree = None,
    *,
    key: Key[Array, ""],
    estimator: Any,
    curvature_microbatches: int | None = None,
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """Compute the mean loss, its gradient and a curvature estimate, in the same passes as the trainer.

    With `GaussNewtonBartlett`, the estimate costs one extra backward pass, or none with `extra_pass=False`. The
    estimator's `losses` method computes the three results of `losses_fn` from the outputs of a model. This keeps two
    cotangents of the outputs in memory; for a large vocabulary, write a `losses_fn` that applies the head to the final
    hidden states in blocks and computes both losses in one pass (as `sophia_levanter.models.loss` does).

    Args:
        losses_fn: (model, key) or (model, microbatch, key) -> (mean loss on the true targets, mean loss on targets
            drawn from the model's own distribution, number of targets). `Hutchinson` uses only the first and the third.
        model: any pytree.
        microbatches: a pytree of arrays or NamedArrays [microbatch, ...]; None for a single pass.
        key: a JAX random key for the sampled targets or the probe.
        estimator: the curvature estimator, such as `optimizer.estimator_at(state)`.
        curvature_microbatches: the number of leading microbatches used to estimate the curvature; None uses all.

    Returns:
        The loss, the gradient and the estimate. The last two are structured like the trainable part of the model.

    Raises:
        ValueError: if a loss is not a scalar, or if there are fewer microbatches than `curvature_microbatches`.
        TypeError: if the estimator does not define `gradient_and_estimate`.

    Examples:
        >>> estimator, x, y = GaussNewtonBartlett(), jnp.ones((4, 1)), jnp.arange(4) % 2
        >>> def losses_fn(w, key):
        ...     return estimator.losses(x @ w, y, key=key)
        >>> loss, grads, h_hat = value_grad_and_curvature(
        ...     losses_fn, jnp.zeros((1, 2)), key=jax.random.key(0), estimator=estimator
        ... )
        >>> f"{loss:.4f}", grads.tolist()  # log 2, and the classes are equally frequent
        ('0.6931', [[0.0, 0.0]])
    """
    if not hasattr(estimator, "gradient_and_estimate"):
        raise TypeError(f"estimator is {estimator!r}; it must define gradient_and_estimate(step)")
    first: PyTree = microbatches
    others: tuple[PyTree, ...] = ()
    if curvature_microbatches is not None:
        if microbatches is None:
            raise ValueError(f"curvature_microbatches is {curvature_microbatches}, but there are no microbatches")
        total, wanted = num_microbatches(microbatches), whole_number(curvature_microbatches)
        if type(wanted) is not int or not 0 < wanted <= total:
            raise ValueError(
                f"curvature_microbatches is {curvature_microbatches!r}; it must be an integer between 1 and {total}"
            )
        first, rest = split_at(microbatches, wanted)
        others = () if rest is None else (rest,)
    step = RefreshStep(losses_fn, model, key, microbatches, first, others)
    sums, h_hat = estimator.gradient_and_estimate(step)
    return *sums.mean(), h_hat
