"""Token-by-token text generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from sophia_levanter.config.trainer import Sampling
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.optim._categorical import sample_categorical

SHORTEST_PREFILL = 128


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    keys: jax.Array,
    sampling: Sampling,
    end_of_text: int | None = None,
    document_end: int | None = None,
) -> Iterator[list[int | None]]:
    """Generate tokens for all prompts at once, one position at a time.

    For each token, the model processes one position, not the whole context. When the context of a row is full, its last
    half is processed again as a new context, because learned positions cannot be shifted. The tokens of a row depend
    only on its prompt and its key, not on other rows. The rows are sharded across the devices along the batch axis if
    the number of rows is a multiple of the number of devices.

    Args:
        model: a trained model in the compute dtype; if it is sharded, its partition must be active.
        prompts: at least one token each; only the last `seq_len` tokens are used.
        num_tokens: the maximum number of tokens for each prompt.
        keys: JAX random keys, [prompt].
        sampling: temperature, top_k and top_p.
        end_of_text: the token that ends a row, or None.
        document_end: the token after which attention and positions were restarted in training (`data.mask_documents`);
            a row starts a new context after it. None if they were not restarted.

    Yields:
        Each prompt's next token, or None for a prompt that has ended. Stops when all prompts have ended.

    Raises:
        ValueError: if a prompt is empty or contains an id outside the model's vocabulary.
    """
    for prompt in prompts:
        if not len(prompt):
            raise ValueError("a prompt is empty; it must contain at least one token")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ValueError(f"a prompt contains token ids outside [0, {model.vocab_size})")
    rows = _Rows(model, prompts, keys, sampling, document_end)

    def draws() -> Iterator[list[int | None]]:
        going = list(range(len(prompts)))
        for number in range(num_tokens):
            drawn = rows.draw(number)
            yield [token if row in going else None for row, token in enumerate(drawn)]
            going = [row for row in going if drawn[row] != end_of_text]
            if not going:
                return
            for row in going:
                rows.append(row, drawn[row])

    return draws()


def restricted(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Restrict logits to the tokens that may be drawn. The temperature must not be 0.

    Args:
        logits: [..., vocab].
        sampling: the settings; as in transformers, ties for rank k are kept, and so is the token that reaches `top_p`.

    Returns:
        float32 [..., vocab], divided by the temperature; -inf for tokens that cannot be drawn.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jnp.take_along_axis(jax.nn.softmax(logits), order, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.put_along_axis(jnp.zeros_like(logits, bool), order, before < sampling.top_p, axis=-1, inplace=False)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


class _Rows:
    """Generation state: each prompt with the tokens drawn so far, and the cache."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        keys: jax.Array,
        sampling: Sampling,
        document_end: int | None,
    ) -> None:
        self._model, self._sampling, self._document_end = model, sampling, document_end
        self._seq_len = model.config.seq_len
        documents = (_last_document(list(map(int, prompt)), document_end) for prompt in prompts)
        self._contexts = [document[-self._seq_len :] for document in documents]
        # Keep the keys as NumPy arrays, which also work if the model spans several hosts.
        self._keys = np.asarray(jax.random.key_data(keys))
        self._Batch = Axis("batch", len(self._contexts))
        self._cache = _empty(model, self._Batch)
        for row in range(len(prompts)):
            self._prefill(row)

    def draw(self, number: int) -> list[int]:
        """Draw the next token of each row; `number` counts the draws from 0."""
        last = np.array([context[-1] for context in self._contexts], np.int32)
        positions = np.array([len(context) - 1 for context in self._contexts], np.int32)
        tokens, self._cache = _draw(
            self._model,
            self._cache,
            hax.named(last, self._Batch),
            hax.named(positions, self._Batch),
            self._keys,
            np.int32(number),
            self._sampling,
        )
        return np.asarray(tokens).tolist()

    def append(self, row: int, token: int) -> None:
        """Append a token to a row.

        A new context starts after the end of a document. A full context is replaced by its last half.
        """
        context = self._contexts[row]
        if context[-1] == self._document_end:
            context.clear()
        context.append(token)
        if len(context) > self._seq_len:
            del context[: -max(1, self._seq_len // 2)]
            self._prefill(row)

    def _prefill(self, row: int) -> None:
        """Write the tokens of a row to the cache, except for the last one, which is decoded next."""
        context = self._contexts[row][:-1]
        if context:
            window = np.zeros(_prefill_length(len(context), self._seq_len), np.int32)
            window[: len(context)] = context
            self._cache = _prefill(self._model, self._cache, np.int32(row), hax.named(window, "position"))


def _last_document(tokens: list[int], document_end: int | None) -> list[int]:
    """Return the tokens of the document containing the last token; an end token belongs to the document it ends."""
    begins = [place + 1 for place, token in enumerate(tokens[:-1]) if token == document_end]
    return tokens[begins[-1] :] if begins else tokens


@partial(jax.jit, static_argnames="Batch")
def _empty(model: LanguageModel, Batch: Axis) -> Any:
    return model.empty_cache(Batch)


@partial(jax.jit, donate_argnames="cache")
def _prefill(model: LanguageModel, cache: Any, row: jax.Array, tokens: NamedArray) -> Any:
    return model.prefill(cache, row, tokens)


@partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def _draw(
    model: LanguageModel,
    cache: Any,
    tokens: NamedArray,
    positions: NamedArray,
    keys: jax.Array,
    number: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, Any]:
    """Draw the next token of each row given `tokens` at `positions`; int32 [batch], replicated on every device."""
    logits, cache = model.decode_step(cache, tokens, positions)
    drawn = _drawn(logits.rearrange(("batch", "vocab")).array, keys, number, sampling)
    return hax.shard(hax.named(drawn, "batch"), {}).array, cache


def _drawn(logits: jax.Array, keys: jax.Array, number: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    row_keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys), number)
    return sample_categorical(restricted(logits, sampling), jax.vmap(jax.random.uniform)(row_keys))


def _prefill_length(needed: int, seq_len: int) -> int:
    """Halve `seq_len` repeatedly while it remains at least `needed` and a multiple of 128.

    Kernels require such a multiple, and halving keeps the number of compiled lengths small.
    """
    length = seq_len
    while length % (2 * SHORTEST_PREFILL) == 0 and length // 2 >= needed:
        length //= 2
    return length
