"""The FLOP/s that devices can do at best."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 matrix FLOP/s as published by the makers, by a part of jax's device kind.
_PUBLISHED_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(devices: list[jax.Device]) -> float:
    """FLOP/s that the devices together can do at best: published, or measured here for a kind that is not listed."""
    kind = devices[0].device_kind
    for name, peak in _PUBLISHED_PEAKS.items():
        if name in kind:
            return peak * len(devices)
    # Several CPU devices of one host share its cores.
    return _measured_matrix_rate() * (1 if devices[0].platform == "cpu" else len(devices))


def _measured_matrix_rate(size: int = 1024, repeats: int = 5) -> float:
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(times)
