"""The trainer's step beside a training step written by hand: `python -m sophia_levanter.benchmarks.nano_step`.

Both train the same GPT-2 with Sophia-G on the same batch in one process, taking turns, so that a noisy machine slows
both alike. The hand-written step is plain jax: a dictionary of arrays, a Python loop over layers, whole logits, no
microbatches, no check for non-finite numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.batch import batch_from_windows
from sophia_levanter.command_line import load_config
from sophia_levanter.config import TrainConfig
from sophia_levanter.models.config import Gpt2Config
from sophia_levanter.models.gpt2 import Gpt2, decay_mask
from sophia_levanter.models.huggingface import gpt2_to_state_dict
from sophia_levanter.partition.mesh import partition_of
from sophia_levanter.training.config import SophiaGConfig
from sophia_levanter.training.optimizers import build_schedule, build_step_settings
from sophia_levanter.training.step import TrainState, train_step

Params = dict[str, jax.Array]
VOCAB_SIZE = 257


def hidden_by_hand(config: Gpt2Config, p: Params, tokens: jax.Array) -> jax.Array:
    """Final hidden states [batch, position, embed] of a GPT-2 without biases, from its state dict."""

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.var(x, -1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + config.layer_norm_epsilon) * weight

    batch, positions = tokens.shape
    heads = (batch, positions, config.num_heads, -1)
    x = p["transformer.wte.weight"][tokens] + p["transformer.wpe.weight"][:positions]
    for i in range(config.num_layers):
        name = f"transformer.h.{i}"
        qkv = norm(x, p[f"{name}.ln_1.weight"]) @ p[f"{name}.attn.c_attn.weight"]
        q, k, v = (a.reshape(heads) for a in jnp.split(qkv, 3, axis=-1))
        if config.scale_attn_by_inverse_layer_idx:
            q = q / (i + 1)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, positions, -1)
        x = x + attended @ p[f"{name}.attn.c_proj.weight"]
        inner = jax.nn.gelu(norm(x, p[f"{name}.ln_2.weight"]) @ p[f"{name}.mlp.c_fc.weight"])
        x = x + inner @ p[f"{name}.mlp.c_proj.weight"]
    return norm(x, p["transformer.ln_f.weight"])


def loss_by_hand(config: Gpt2Config, p: Params, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean next-token loss in nats."""
    logits = hidden_by_hand(config, p, tokens) @ p["transformer.wte.weight"].T
    logits = jnp.where(jnp.arange(logits.shape[-1]) < VOCAB_SIZE, logits, -jnp.inf)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def step_by_hand(
    config: TrainConfig, windows: jax.Array, p: Params, m: Params, h: Params, count: jax.Array
) -> tuple[Params, Params, Params, jax.Array, jax.Array]:
    """One Sophia-G step without a refresh; returns parameters, m, h, the count and the loss."""
    o = config.optimizer
    assert isinstance(o, SophiaGConfig)
    loss, g = jax.value_and_grad(partial(loss_by_hand, config.model))(p, windows[:, :-1], windows[:, 1:])
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(g)))
    g = jax.tree.map(lambda x: x * jnp.minimum(1.0, 1.0 / norm), g)
    m = jax.tree.map(lambda m, g: o.b1 * m + (1 - o.b1) * g, m, g)
    rate = build_schedule(o, config.trainer.num_train_steps)(count)

    def updated(p: jax.Array, m: jax.Array, h: jax.Array) -> jax.Array:
        m_hat = m / (1 - o.b1 ** (count + 1)) if o.bias_correct_momentum else m
        decay = o.weight_decay if p.ndim > 1 else 0.0
        return p - rate * (jnp.clip(m_hat / jnp.maximum(o.rho * h, o.eps), -1, 1) + decay * p)

    return jax.tree.map(updated, p, m, h), m, h, count + 1, loss


def main() -> None:
    """Time both steps in turns and print the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("config/gpt2_nano_sophia.yaml"))
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    ours, by_hand = _our_step(config), _hand_step(config)
    first = ours(), by_hand()
    print(f"loss of the first step: trainer {first[0]:.6f}, by hand {first[1]:.6f}")
    seconds = np.array([[_seconds(ours), _seconds(by_hand)] for _ in range(arguments.rounds)])
    ratios = seconds[:, 0] / seconds[:, 1]
    low, high = np.quantile(ratios, [0.25, 0.75])
    print(
        f"trainer {1e3 * np.median(seconds[:, 0]):.1f} ms, by hand {1e3 * np.median(seconds[:, 1]):.1f} ms a step; "
        f"ratio {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}, {arguments.rounds} rounds)"
    )


def _windows(config: TrainConfig) -> np.ndarray:
    shape = (config.trainer.batch_size, config.model.seq_len + 1)
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, shape, dtype=np.int32)


def _model(config: TrainConfig) -> Gpt2:
    return Gpt2.init(config.model, vocab_size=VOCAB_SIZE, key=jax.random.key(0))


def _our_step(config: TrainConfig) -> Callable[[], float]:
    partition = partition_of()
    settings = build_step_settings(config.optimizer, config.trainer, decay_mask)
    batch = partition.place(batch_from_windows(_windows(config), num_microbatches=config.trainer.num_microbatches))
    state = partition.place(TrainState.init(_model(config), settings.optimizer, settings.policy))
    step: Any = eqx.filter_jit(partial(train_step, settings, False), donate="all-except-first")
    with partition.active():
        compiled = step.lower(batch, state).compile()

    def run() -> float:
        nonlocal state
        state, output = compiled(batch, state)
        return float(output.metrics["train/loss"])

    return run


def _hand_step(config: TrainConfig) -> Callable[[], float]:
    p = {name: jnp.asarray(array) for name, array in gpt2_to_state_dict(_model(config)).items()}
    # The same padded head as the trainer's, so that both multiply the same matrices.
    p["transformer.wte.weight"] = _model(config).wte.weight.array
    zeros = [jax.tree.map(jnp.zeros_like, p) for _ in range(2)]
    windows = jnp.asarray(_windows(config))
    state = (p, *zeros, jnp.zeros((), jnp.int32))
    step = jax.jit(partial(step_by_hand, config), donate_argnums=(1, 2, 3, 4)).lower(windows, *state).compile()

    def run() -> float:
        nonlocal state
        *state, loss = step(windows, *state)
        return float(loss)

    return run


def _seconds(run: Callable[[], float]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
