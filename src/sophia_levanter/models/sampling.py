"""Text from a model, token by token."""

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
    """Tokens drawn one after the other, one for each prompt at a time.

    A token costs one position of the model, not the whole context. When a row's context is full, the last half of it is
    read anew as a context of its own, since the model has learned its positions one by one and cannot shift them. What
    a row gets depends on its prompt and its key alone, not on the rows beside it. Where their number divides over
    the devices that have rows of their own, they are spread over these.

    Args:
        model: a trained model in the dtype to compute in; what lies on several devices, inside its partition's context.
        prompts: at least one token each; of a longer one than the model's context only the last `seq_len` are read.
        num_tokens: how many to draw for each prompt, at most.
        keys: jax random keys, [prompt].
        sampling: how they are drawn.
        end_of_text: a token that ends a row, if any does.
        document_end: the token at which attention and positions stopped in training (`data.mask_documents`): a row goes
            on after it as a context of its own. None if they did not.

    Yields:
        Each prompt's next token; None once it has ended. Stops when all have.

    Raises:
        ValueError: if a prompt is empty or holds an id the model does not have.
    """
    for prompt in prompts:
        if not len(prompt):
            raise ValueError("a prompt is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ValueError(f"a prompt holds ids outside [0, {model.vocab_size})")
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
    """The logits to draw from, where the temperature is not 0.

    Args:
        logits: [..., vocab].
        sampling: as in transformers, the tokens as likely as the k-th stay, and so does the one that reaches `top_p`.

    Returns:
        float32 [..., vocab], divided by the temperature; -inf for what is not to be drawn.
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
    """Prompts with what was drawn after them, and the cache that belongs to them."""

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
        # Arrays of this host, which go with a model that lies on several.
        self._keys = np.asarray(jax.random.key_data(keys))
        self._Batch = Axis("batch", len(self._contexts))
        self._cache = _empty(model, self._Batch)
        for row in range(len(prompts)):
            self._prefill(row)

    def draw(self, number: int) -> list[int]:
        """The next token of each row, the `number`-th."""
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
        """Put a token behind a row's last; when that ended a document, or the context is full, go on with a new one."""
        context = self._contexts[row]
        if context[-1] == self._document_end:
            context.clear()
        context.append(token)
        if len(context) > self._seq_len:
            del context[: -max(1, self._seq_len // 2)]
            self._prefill(row)

    def _prefill(self, row: int) -> None:
        """Put all but a row's last token, which is the next to be decoded, into the cache."""
        context = self._contexts[row][:-1]
        if context:
            window = np.zeros(_prefill_length(len(context), self._seq_len), np.int32)
            window[: len(context)] = context
            self._cache = _prefill(self._model, self._cache, np.int32(row), hax.named(window, "position"))


def _last_document(tokens: list[int], document_end: int | None) -> list[int]:
    """The tokens of the document that the last token is in; one that ends a document is the last of it."""
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
    """The next token of each row, int32 [batch] on every device, after `tokens` at `positions`."""
    logits, cache = model.decode_step(cache, tokens, positions)
    drawn = _drawn(logits.rearrange(("batch", "vocab")).array, keys, number, sampling)
    return hax.shard(hax.named(drawn, "batch"), {}).array, cache


def _drawn(logits: jax.Array, keys: jax.Array, number: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    row_keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys), number)
    return sample_categorical(restricted(logits, sampling), jax.vmap(jax.random.uniform)(row_keys))


def _prefill_length(needed: int, seq_len: int) -> int:
    """The context's length halved while that is enough and a multiple of 128, which kernels like: few are compiled."""
    length = seq_len
    while length % (2 * SHORTEST_PREFILL) == 0 and length // 2 >= needed:
        length //= 2
    return length
