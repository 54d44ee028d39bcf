"""Next-token cross-entropy in blocks of positions, so that the logits of a whole batch are never in memory at once.

While the logits of a block are in memory, the forward pass also computes the block's contribution to the gradients of
the hidden states and the head; the backward pass only scales these gradients. The same forward pass can also draw
labels from the model's own distribution and compute their gradients, as required for Gauss-Newton-Bartlett.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from sophia_levanter.optim._categorical import sample_categorical
from sophia_levanter.partition.mesh import by_row_shard, row_shards


class Targets(NamedTuple):
    """Labels for the hidden states; all arrays are [batch, position].

    Attributes:
        labels: int32, the true next tokens.
        weights: float32, the weight of each position in the summed loss.
        samples: float32 uniforms in [0, 1) used to draw labels by inverting the model's cumulative distribution, or
            int labels drawn elsewhere; None for no second loss.
    """

    labels: jax.Array
    weights: jax.Array
    samples: jax.Array | None


class _Gradients(NamedTuple):
    hidden: jax.Array
    head: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blocked_cross_entropy(
    vocab_size: int, block_size: int, hidden: jax.Array, head: jax.Array, targets: Targets
) -> tuple[jax.Array, jax.Array]:
    """Compute weighted sums of the cross-entropy on the true and on the sampled labels.

    The second sum uses the square root of the weight of each position, so that the expectation of its squared gradient
    is the weighted sum of the Gauss-Newton diagonals of the positions. Reverse mode and forward-over-reverse mode work;
    forward mode alone does not.

    Args:
        vocab_size: classes from this index on are padding, which is never predicted or drawn.
        block_size: number of positions whose logits are in memory at a time.
        hidden: [batch, position, embed] final hidden states.
        head: [vocab, embed].
        targets: the labels; see `Targets`.

    Returns:
        Two scalars in nats, float32 or wider; the second is 0 without samples.
    """
    losses, _ = _run_blocks(vocab_size, block_size, hidden, head, targets, with_gradients=False)
    return losses


def _forward(
    vocab_size: int, block_size: int, *primals: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Gradients, ...]]:
    hidden, head, targets = jax.tree.map(lambda primal: primal.value, primals)
    return _run_blocks(vocab_size, block_size, hidden, head, targets, with_gradients=True)


def _backward(
    vocab_size: int, block_size: int, kept: tuple[_Gradients, ...], cotangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array, None]:
    # If a loss is not differentiated, its cotangent is a symbolic zero and its gradients are never computed.
    used = [(g, c) for g, c in zip(kept, cotangents, strict=False) if not isinstance(c, SymbolicZero)]
    hidden, head = (
        sum((g * c for g, (_, c) in zip(parts, used, strict=True)), start=jnp.zeros((), parts[0].dtype)).astype(
            parts[0].dtype
        )
        for parts in zip(*(g for g, _ in used), strict=True)
    )
    return hidden, head, None


blocked_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _run_blocks(
    vocab_size: int, block_size: int, hidden: jax.Array, head: jax.Array, targets: Targets, *, with_gradients: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Gradients, ...]]:
    """Sum over all rows, shard by shard, so that the gradient of the head is summed over devices only once."""
    shards = row_shards()
    run = partial(_run_shard, vocab_size, block_size, head, with_gradients=with_gradients)
    if shards == 1:
        losses, gradients = run(hidden, targets)
    else:
        split = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), (hidden, targets))
        losses, gradients = by_row_shard(jax.vmap(run)(*by_row_shard(split)))
        losses = jnp.sum(losses[0]), jnp.sum(losses[1])
        gradients = tuple(_Gradients(g.hidden.reshape(hidden.shape), jnp.sum(g.head, axis=0)) for g in gradients)
    return losses, tuple(_Gradients(g.hidden, g.head.astype(head.dtype)) for g in gradients)


def _run_shard(
    vocab_size: int, block_size: int, head: jax.Array, hidden: jax.Array, targets: Targets, *, with_gradients: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Gradients, ...]]:
    positions = hidden.shape[1]
    one_block = partial(_one_block, vocab_size, head, with_gradients=with_gradients)
    if positions <= block_size:
        return one_block(hidden, targets)

    blocks = jax.tree.map(partial(_split_positions, block_size), (hidden, targets))

    def parts(hidden: jax.Array, targets: Targets) -> tuple[tuple, tuple[jax.Array, ...]]:
        """Return the results of a block: first those to sum over blocks, then those to concatenate."""
        losses, gradients = one_block(hidden, targets)
        return (losses, tuple(g.head for g in gradients)), tuple(g.hidden for g in gradients)

    def body(carry: tuple, block: tuple) -> tuple[tuple, tuple[jax.Array, ...]]:
        summed, hiddens = parts(*block)
        return jax.tree.map(jnp.add, carry, summed), hiddens

    shapes, _ = jax.eval_shape(parts, *jax.tree.map(lambda x: x[0], blocks))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (losses, heads), hiddens = jax.lax.scan(body, start, blocks)
    return losses, tuple(_Gradients(_join_positions(h, positions), d) for h, d in zip(hiddens, heads, strict=True))


def _one_block(
    vocab_size: int, head: jax.Array, hidden: jax.Array, targets: Targets, *, with_gradients: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Gradients, ...]]:
    """Compute both losses at some positions, and their gradients with respect to the hidden states and the head."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("bte,ve->btv", hidden, head, preferred_element_type=wide)
    classes = jnp.arange(head.shape[0], dtype=jnp.int32)
    if vocab_size < head.shape[0]:
        logits = jnp.where(classes < vocab_size, logits, -jnp.inf)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    labels = [(targets.labels, targets.weights)]
    if targets.samples is not None:
        labels.append((_draw(logits, targets.samples), jnp.sqrt(targets.weights)))

    losses = [
        jnp.sum((log_normalizer - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]) * w) for y, w in labels
    ]
    if len(losses) == 1:
        losses.append(jnp.zeros_like(losses[0]))
    if not with_gradients:
        return (losses[0], losses[1]), ()

    probabilities = jnp.exp(logits - log_normalizer[..., None])

    def gradients(y: jax.Array, w: jax.Array) -> _Gradients:
        d = ((probabilities - (classes == y[..., None])) * w[..., None]).astype(hidden.dtype)
        return _Gradients(
            jnp.einsum("btv,ve->bte", d, head),
            jnp.einsum("btv,bte->ve", d, hidden, preferred_element_type=wide),
        )

    return (losses[0], losses[1]), tuple(gradients(y, w) for y, w in labels)


def _draw(logits: jax.Array, samples: jax.Array) -> jax.Array:
    if jnp.issubdtype(samples.dtype, jnp.integer):
        return samples
    # Draw row by row: for a vectorized draw, the TPU compiler materializes several logits-sized temporaries.
    return jax.lax.map(lambda row: sample_categorical(*row), (jax.lax.stop_gradient(logits), samples))


def _split_positions(block_size: int, x: jax.Array) -> jax.Array:
    """Split [batch, position, ...] into [block, batch, position in block, ...]. Padding is 0 and thus has weight 0."""
    padding = -x.shape[1] % block_size
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block_size, *x.shape[2:]), 1, 0)


def _join_positions(x: jax.Array, positions: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :positions]
