"""Time to draw a token: `python -m sophia_levanter.benchmarks.sampling`.

With the cache of keys and values, after prompts of one token: texts of several lengths, also beyond the context, and
several rows at a time. Beside it the forward pass over the whole context for every token. All with the same drawn model
in one process, in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import haliax as hax
import jax
import jax.numpy as jnp
import jmp

from sophia_levanter.benchmarks.arguments import parse_with_overrides
from sophia_levanter.benchmarks.timing import Spread, markdown_table, seconds_in_turns, spread
from sophia_levanter.config import TrainConfig
from sophia_levanter.config.sampling import Sampling
from sophia_levanter.models.language_model import LanguageModel
from sophia_levanter.models.sampling import generate, restricted
from sophia_levanter.optim._categorical import sample_categorical

SAMPLING = Sampling(temperature=1.0)
WHOLE = "whole contexts"


class Timing(NamedTuple):
    """How long a token takes.

    Attributes:
        name: what was timed.
        milliseconds: for one token of one row.
        beside: the time with whole contexts over this one, of the same round.
    """

    name: str
    milliseconds: Spread
    beside: Spread


def by_whole_contexts(model: LanguageModel, num_tokens: int) -> jax.Array:
    """Tokens, each drawn from a forward pass over the whole context."""
    seq_len = model.config.seq_len

    def draw(window: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
        last = jnp.minimum(n, seq_len - 1)
        logits = model(hax.named(window, "position")).array[last]
        uniform = jax.random.uniform(jax.random.fold_in(jax.random.key(0), n))
        token = sample_categorical(restricted(logits, SAMPLING), uniform)
        window = jnp.where(n < seq_len - 1, window, jnp.roll(window, -1))
        return window.at[jnp.minimum(n + 1, seq_len - 1)].set(token), token

    return jax.lax.scan(draw, jnp.zeros(seq_len, jnp.int32), jnp.arange(num_tokens))[1]


def with_cache(model: LanguageModel, num_rows: int, num_tokens: int) -> list[list[int | None]]:
    """Tokens of several rows, drawn with the cache."""
    keys = jnp.broadcast_to(jax.random.key(0), (num_rows,))
    return list(generate(model, [[0]] * num_rows, num_tokens, keys=keys, sampling=SAMPLING))


def measure(
    config: TrainConfig, vocab_size: int, lengths: Sequence[int], rows: Sequence[int], rounds: int
) -> list[Timing]:
    """Time per token, each length with one row and the first length with several."""
    policy = jmp.get_policy(f"params=float32,compute={config.trainer.compute_dtype}")
    model = policy.cast_to_compute(config.model.build(vocab_size=vocab_size, key=jax.random.key(0)))
    drawn = {f"1 row, {n} tokens": (1, n) for n in lengths} | {
        f"{r} rows, {lengths[0]} tokens": (r, lengths[0]) for r in rows
    }
    few = min(lengths[0], 8)
    whole = jax.jit(by_whole_contexts, static_argnums=1)
    runs: dict[str, Callable[[], object]] = {WHOLE: partial(whole, model, few)}
    runs |= {name: partial(with_cache, model, *size) for name, size in drawn.items()}
    seconds = seconds_in_turns(runs, rounds)
    per_token = {WHOLE: seconds[WHOLE] / few}
    per_token |= {name: seconds[name] / (num_rows * length) for name, (num_rows, length) in drawn.items()}
    return [Timing(name, spread(1e3 * taken), spread(per_token[WHOLE] / taken)) for name, taken in per_token.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=Path("config/gpt2_nano_sophia.yaml"))
    parser.add_argument("--vocab_size", type=int, default=257)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512, 2048], help="tokens to draw")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 32], help="rows, of the first length")
    parser.add_argument("--rounds", type=int, default=10)
    arguments, config = parse_with_overrides(parser, argv)
    timings = measure(config, arguments.vocab_size, arguments.lengths, arguments.rows, arguments.rounds)
    print("Medians and quartiles over rounds; the ratios are of the same round.\n")
    print(markdown_table(["drawn", "ms a token", "whole contexts over it"], timings))


if __name__ == "__main__":
    main()
