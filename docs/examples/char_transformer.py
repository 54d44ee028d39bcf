"""Train a small character-level transformer of plain Equinox modules on the source code of argparse with Sophia-G.

Every Python installation includes this source. Each row is a paragraph, truncated or padded to 64 characters. Padding
has weight 0. The baseline is a table of character bigrams.
"""

import argparse
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_levanter.optim import SophiaG, split_microbatches, value_grad_and_curvature

STEPS, ROWS, MICROBATCH, LENGTH, WIDTH, HEADS = 120, 16, 4, 64, 64, 4


def load():
    """Return (tokens [row, LENGTH + 1], lengths [row]) for training, the same for testing, and the vocabulary size.

    Token 0 marks the end of a paragraph and the padding after it. Every fifth paragraph is held out for testing.
    """
    paragraphs = [part for part in inspect.getsource(argparse).split("\n\n") if part.strip()]
    characters = sorted(set("".join(paragraphs)))
    token = {character: i + 1 for i, character in enumerate(characters)}
    rows = np.zeros((len(paragraphs), LENGTH + 1), np.int32)
    lengths = np.asarray([min(len(part), LENGTH) for part in paragraphs])
    for row, part in zip(rows, paragraphs, strict=True):
        part = part[: LENGTH + 1]
        row[: len(part)] = [token[character] for character in part]
    test = np.arange(len(rows)) % 5 == 4
    return (rows[~test], lengths[~test]), (rows[test], lengths[test]), len(characters) + 1


class Block(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        attention_key, mlp_key = jax.random.split(key)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=attention_key)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=mlp_key)

    def __call__(self, x):
        normed = jax.vmap(self.norms[0])(x)
        x = x + self.attention(normed, normed, normed, mask=jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class Transformer(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, characters, key):
        keys = jax.random.split(key, 5)
        self.tokens = eqx.nn.Embedding(characters, WIDTH, key=keys[0])
        self.positions = 0.1 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.blocks = [Block(keys[2]), Block(keys[3])]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, characters, key=keys[4])

    def __call__(self, tokens):
        x = jax.vmap(self.tokens)(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def weights_of(lengths):
    """Return target weights [row, LENGTH]: 1 for characters in the paragraph and for its end, 0 for padding."""
    return jnp.asarray(jnp.arange(LENGTH) < lengths[:, None], jnp.float32)


def weighted_loss(model, batch):
    """Return the sum of the losses over all targets with weight 1, and the number of these targets."""
    rows, lengths = batch
    logits = jax.vmap(model)(rows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return jnp.sum(losses * weights_of(lengths)), jnp.sum(weights_of(lengths))


@eqx.filter_jit
def train_step(optimizer, model, state, batch):
    def mean_loss(model):
        total, count = weighted_loss(model, batch)
        return total / count

    loss, grads = eqx.filter_value_and_grad(mean_loss)(model)
    updates, state = optimizer.update(grads, state, model)
    return eqx.apply_updates(model, updates), state, loss


@eqx.filter_jit
def train_step_with_refresh(optimizer, model, state, batch, key):
    """Take a step that also refreshes the curvature, which is estimated on the first half of the microbatches."""

    def losses(model, microbatch, key):
        rows, lengths = microbatch
        logits = jax.vmap(model)(rows[:, :-1])
        return optimizer.estimator.losses(logits, rows[:, 1:], key=key, weights=weights_of(lengths))

    microbatches, _ = split_microbatches(batch, MICROBATCH)
    loss, grads, h_hat = value_grad_and_curvature(
        losses,
        model,
        microbatches,
        key=key,
        estimator=optimizer.estimator_at(state),
        curvature_microbatches=ROWS // MICROBATCH // 2,
    )
    updates, state = optimizer.update(grads, state, model, h_hat)
    return eqx.apply_updates(model, updates), state, loss


def bigram_loss(data, test, characters):
    """Return the test loss, in nats per character, of a bigram table of the training rows with add-one smoothing."""

    def pairs(data):
        rows, lengths = data
        real = np.asarray(weights_of(lengths)) > 0
        return rows[:, :-1][real], rows[:, 1:][real]

    counts = np.ones((characters, characters))
    np.add.at(counts, pairs(data), 1)
    table = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(-table[pairs(test)].mean())


def main(optimizer=None):
    data, test, characters = load()
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, STEPS)
    optimizer = optimizer or SophiaG(
        learning_rate=schedule,
        b1=0.9,
        rho="auto",
        weight_decay=0.1,
        weight_decay_mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        gradient_transform=optax.clip_by_global_norm(1.0),
    )
    model = Transformer(characters, jax.random.key(1))
    state = optimizer.init(model)
    for step, chosen in enumerate(np.random.default_rng(2).integers(len(data[0]), size=(STEPS, ROWS))):
        batch = (data[0][chosen], data[1][chosen])
        if optimizer.refresh_due(step):
            key = jax.random.fold_in(jax.random.key(3), step)
            model, state, loss = train_step_with_refresh(optimizer, model, state, batch, key)
        else:
            model, state, loss = train_step(optimizer, model, state, batch)
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}")
    total, count = eqx.filter_jit(weighted_loss)(model, test)
    metrics = {name: float(value) for name, value in optimizer.metrics(state).items()}
    bigram = bigram_loss(data, test, characters)
    print(f"test loss {total / count:.3f} nats per character; a bigram table has {bigram:.3f}")
    print(f"win rate {metrics['win_rate']:.2f}, rho steered from 0.05 to {metrics['rho']:.3f}")
    return {"test_loss": float(total / count), "bigram_loss": bigram, "metrics": metrics}


if __name__ == "__main__":
    main()
