"""How fast a device decomposes and orthogonalises matrices: `python -m sophia_levanter.benchmarks.matrix_rates`.

On jax's default device, in float32: QR decompositions of side x side matrices one after another, Newton-Schulz
iterations of side x 4 side matrices, and products of square matrices. Compare the first two with the rates that `plan`
assumes of each chip (`planning/target.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sophia_levanter.benchmarks.timing import markdown_table, seconds_in_turns
from sophia_levanter.optim._muon import COEFFICIENTS, orthogonalized
from sophia_levanter.training.costs import newton_schulz_flops, qr_flops

HEADER = ["side", "QR, ms", "QR, GFLOP/s", "Newton-Schulz, GFLOP/s", "product, GFLOP/s"]


def rates(side: int, count: int, rounds: int) -> list[object]:
    """A row of the table: the fastest of some rounds of `count` matrices each."""
    square = jax.random.normal(jax.random.key(0), (count, side, side))
    oblong = jax.random.normal(jax.random.key(1), (count, side, 4 * side)) / (2 * side)
    qr = jax.jit(lambda x: jax.lax.map(lambda x: jnp.linalg.qr(x)[0], x))
    coefficients = jnp.asarray(COEFFICIENTS)
    orthogonalize = jax.jit(lambda x: jax.lax.map(lambda x: orthogonalized(x, coefficients, 1e-8), x))
    multiply = jax.jit(lambda x: jax.lax.map(lambda x: x @ x, x))
    runs = {"qr": lambda: qr(square), "ns": lambda: orthogonalize(oblong), "product": lambda: multiply(square)}
    seconds = [float(x.min()) / count for x in seconds_in_turns(runs, rounds).values()]
    flops = (qr_flops(side), newton_schulz_flops(side, 4 * side), 2.0 * side**3)
    return [side, f"{1e3 * seconds[0]:.3g}", *(f"{n / s / 1e9:,.3g}" for n, s in zip(flops, seconds, strict=True))]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512, 768, 1280])
    parser.add_argument("--count", type=int, default=4, help="matrices at each side")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    rows = [rates(side, arguments.count, arguments.rounds) for side in arguments.sides]
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
