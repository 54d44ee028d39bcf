"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np

from sophia_levanter.models.gpt2 import Gpt2
from sophia_levanter.optim.likelihood import sample_categorical


def generate(
    model: Gpt2, prompt: Sequence[int], num_tokens: int, *, key: jax.Array, temperature: float = 0.8
) -> np.ndarray:
    """Tokens drawn one after the other, each given as many of those before it as the model's context holds.

    Every token costs a forward pass over the whole context.

    Args:
        model: a trained model.
        prompt: at least one token; only the last `seq_len` are read.
        num_tokens: how many to draw.
        key: a jax random key.
        temperature: above 0; logits are divided by it.

    Returns:
        int32 [num_tokens], without the prompt.

    Raises:
        ValueError: if the prompt is empty or holds an id the model does not have, or the temperature is not above 0.
    """
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
        raise ValueError(f"the prompt holds ids outside [0, {model.vocab_size})")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    seq_len = model.config.seq_len
    context = list(prompt)[-seq_len:]
    window = np.zeros(seq_len, np.int32)
    window[: len(context)] = context
    # Arrays of this host, which go with a model that lies on several.
    uniforms = np.asarray(jax.random.uniform(key, (num_tokens,)))
    return np.asarray(_generate(model, window, np.asarray(len(context)), uniforms, temperature))


@eqx.filter_jit
def _generate(model: Gpt2, window: Any, length: Any, uniforms: Any, temperature: float) -> jax.Array:
    seq_len = window.shape[0]

    def draw(carry: tuple[jax.Array, jax.Array], uniform: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        window, length = carry
        logits = model(hax.named(window, "position")).array
        token = sample_categorical(logits[length - 1] / temperature, uniform)
        # A full window drops its oldest token, else the new one goes behind the last.
        full = length == seq_len
        window = jnp.where(full, jnp.roll(window, -1), window).at[jnp.minimum(length, seq_len - 1)].set(token)
        return (window, jnp.minimum(length + 1, seq_len)), token

    _, tokens = jax.lax.scan(draw, (window, length), uniforms)
    return tokens
