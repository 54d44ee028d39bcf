"""Bytes a second of Sophia's update: `python -m sophia_levanter.benchmarks.optimizer_update`.

Beside it AdamW's and a copy of the parameters, in turns in one process. The bytes are the least that each must move:
Sophia without a refresh reads parameters, gradient, m and h and writes parameters and m; AdamW writes v besides; a copy
reads and writes once. A pass over memory more than that shows as a lower rate. Where `finite` is not given, as the
trainer gives it, Sophia looks through the gradient once more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from sophia_levanter.benchmarks.timing import Spread, markdown_table, seconds_in_turns, spread
from sophia_levanter.optim import SophiaG

PyTree = Any
# Words of 4 bytes read and written for each parameter.
WORDS = {"copy": 1 + 1, "AdamW (optax)": 4 + 3, "Sophia-G": 4 + 2, "Sophia-G, finite given": 4 + 2}
SHARES = (0.4, 0.3, 0.2, 0.1)


class Rate(NamedTuple):
    """How fast something goes over memory: GB/s, and that over the copy's and AdamW's of the same round."""

    name: str
    gigabytes: Spread
    beside_copy: Spread
    beside_adamw: Spread


def arrays(num_parameters: int, value: float) -> dict[str, jax.Array]:
    """A model of four arrays, two of them matrices, of about so many float32 parameters in all."""
    sizes = [max(2, int(share * num_parameters) // 2 * 2) for share in SHARES]
    shapes = [(2, size // 2) if i % 2 == 0 else (size,) for i, size in enumerate(sizes)]
    return {f"array{i}": jnp.full(shape, value, jnp.float32) for i, shape in enumerate(shapes)}


def updates(num_parameters: int) -> dict[str, Callable[[], PyTree]]:
    """What is timed, by name; each works on buffers of its own, which it takes over and gives back."""
    grads, finite = arrays(num_parameters, 1e-3), jnp.asarray(True)
    sophia, adamw = SophiaG(learning_rate=1e-4), optax.adamw(1e-4, weight_decay=0.1)

    def copy_step(grads: PyTree, finite: jax.Array, params: PyTree) -> tuple:
        return (jax.tree.map(jnp.copy, grads),)

    def adamw_step(grads: PyTree, finite: jax.Array, params: PyTree, state: PyTree) -> tuple:
        steps, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, steps), state

    def sophia_step(grads: PyTree, finite: jax.Array, params: PyTree, state: PyTree, *, given: bool) -> tuple:
        steps, state = sophia.update(grads, state, params, finite=finite if given else None)
        return eqx.apply_updates(params, steps), state

    def runner(step: Callable[..., tuple], *inits: Callable[[PyTree], PyTree]) -> Callable[[], PyTree]:
        params = arrays(num_parameters, 1.0)
        # Jitted, so that no two leaves share a buffer, which could not be donated twice.
        held = (params, *(jax.jit(init)(params) for init in inits))
        donated = tuple(range(2, 2 + len(held)))
        compiled = jax.jit(step, donate_argnums=donated, keep_unused=True).lower(grads, finite, *held).compile()

        def run() -> PyTree:
            nonlocal held
            held = compiled(grads, finite, *held)
            return held

        return run

    return {
        "copy": runner(copy_step),
        "AdamW (optax)": runner(adamw_step, adamw.init),
        "Sophia-G": runner(partial(sophia_step, given=False), sophia.init),
        "Sophia-G, finite given": runner(partial(sophia_step, given=True), sophia.init),
    }


def measure(num_parameters: int, rounds: int) -> list[Rate]:
    """Rates of all, timed in turns."""
    seconds = seconds_in_turns(updates(num_parameters), rounds)
    held = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: arrays(num_parameters, 0.0))))
    rates = {name: 4 * words * held / seconds[name] / 1e9 for name, words in WORDS.items()}
    return [
        Rate(name, spread(rate), spread(rate / rates["copy"]), spread(rate / rates["AdamW (optax)"]))
        for name, rate in rates.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rates at several sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 100], help="parameters, in millions")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args(argv)
    rows = [
        (f"{millions:g} M", rate.name, WORDS[rate.name], *rate[1:])
        for millions in arguments.millions
        for rate in measure(int(millions * 1e6), arguments.rounds)
    ]
    print("Medians and quartiles over rounds; rates over the copy's and AdamW's are of the same round.\n")
    print(markdown_table(["parameters", "update", "words each", "GB/s", "over the copy's", "over AdamW's"], rows))


if __name__ == "__main__":
    main()
