"""A GPT-2 training step with AdamW, written by hand in plain JAX for CPUs: the yardstick of `peers`.

No modules, named axes, checks, microbatches or biases. Linear layers act on [batch * position, embed] matrices,
all heads are split by one transposition, and attention goes through blocks of queries with a backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia_levanter.config.model import Gpt2Config, pad_vocab

BLOCKS = 4  # of queries
MASKED = -1e9
Params = dict[str, Any]


def step_by_hand(config: Gpt2Config, vocab_size: int, batch_size: int) -> Callable[[], jax.Array]:
    """A compiled step on one random batch; each call takes a step and returns the loss."""
    rng = np.random.default_rng(0)
    windows = rng.integers(0, vocab_size, (batch_size, config.seq_len + 1), np.int32)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1))

    def step(params: Params, state: Any, windows: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, grads = jax.value_and_grad(partial(_loss, config, vocab_size))(params, windows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = _init(config, vocab_size)
    held = (params, tx.init(params))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held, windows).compile()

    def run() -> jax.Array:
        nonlocal held
        *held, loss = compiled(*held, windows)
        return loss

    return run


def _init(config: Gpt2Config, vocab_size: int) -> Params:
    keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * config.num_layers))
    width = config.embed_dim

    def normal(*shape: int) -> jax.Array:
        return config.initializer_range * jax.random.normal(next(keys), shape)

    def layer() -> Params:
        return {
            "ln_1": jnp.ones(width),
            "c_attn": normal(width, 3 * width),
            "attn_proj": normal(width, width),
            "ln_2": jnp.ones(width),
            "c_fc": normal(width, config.mlp_ratio * width),
            "mlp_proj": normal(config.mlp_ratio * width, width),
        }

    return {
        "wte": normal(pad_vocab(vocab_size), width),
        "wpe": normal(config.seq_len, width),
        "ln_f": jnp.ones(width),
        "layers": [layer() for _ in range(config.num_layers)],
    }


def _loss(config: Gpt2Config, vocab_size: int, params: Params, windows: jax.Array) -> jax.Array:
    tokens, targets = windows[:, :-1], windows[:, 1:]
    x = (params["wte"][tokens] + params["wpe"]).reshape(-1, config.embed_dim)
    for layer in params["layers"]:
        x = _layer(config, len(windows), x, layer)
    logits = (_norm(x, params["ln_f"]) @ params["wte"].T)[:, :vocab_size]
    chosen = jnp.take_along_axis(logits, targets.reshape(-1, 1), -1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def _layer(config: Gpt2Config, batch: int, x: jax.Array, layer: Params) -> jax.Array:
    heads, head_size = config.num_heads, config.embed_dim // config.num_heads
    qkv = (_norm(x, layer["ln_1"]) @ layer["c_attn"]).reshape(batch, -1, 3, heads, head_size)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4).reshape(3, batch * heads, -1, head_size)
    attended = _attention(q, k, v).reshape(batch, heads, -1, head_size)
    x = x + attended.transpose(0, 2, 1, 3).reshape(x.shape) @ layer["attn_proj"]
    return x + jax.nn.gelu(_norm(x, layer["ln_2"]) @ layer["c_fc"]) @ layer["mlp_proj"]


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-5) * weight


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of [batch * heads, position, head_size] arrays."""
    return _attend(q, k, v)[0]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple]:
    outputs, normalizers = [], []
    for start, end in _blocks(q):
        scores = _scores(q, k, start, end)
        normalizers.append(jax.nn.logsumexp(scores, -1))
        outputs.append(jnp.einsum("bqk,bkd->bqd", jnp.exp(scores - normalizers[-1][..., None]), v[:, :end]))
    output = jnp.concatenate(outputs, 1)
    return output, (q, k, v, output, jnp.concatenate(normalizers, 1))


def _attend_back(kept: tuple, d_output: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, output, normalizer = kept
    delta = jnp.sum(d_output * output, -1)
    dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for start, end in _blocks(q):
        rows = slice(start, end)
        weights = jnp.exp(_scores(q, k, start, end) - normalizer[:, rows, None])
        d_weights = jnp.einsum("bqd,bkd->bqk", d_output[:, rows], v[:, :end])
        d_scores = weights * (d_weights - delta[:, rows, None]) * q.shape[-1] ** -0.5
        dq.append(jnp.einsum("bqk,bkd->bqd", d_scores, k[:, :end]))
        dk = dk.at[:, :end].add(jnp.einsum("bqk,bqd->bkd", d_scores, q[:, rows]))
        dv = dv.at[:, :end].add(jnp.einsum("bqk,bqd->bkd", weights, d_output[:, rows]))
    return jnp.concatenate(dq, 1), dk, dv


_attention.defvjp(_attend, _attend_back)


def _blocks(q: jax.Array) -> list[tuple[int, int]]:
    size = q.shape[1] // BLOCKS
    return [(i * size, (i + 1) * size) for i in range(BLOCKS)]


def _scores(q: jax.Array, k: jax.Array, start: int, end: int) -> jax.Array:
    scores = jnp.einsum("bqd,bkd->bqk", q[:, start:end], k[:, :end]) * q.shape[-1] ** -0.5
    return jnp.where(np.tril(np.ones((end - start, end), bool), start), scores, MASKED)
