"""Model FLOPs and what share of the hardware's they are."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from sophia_levanter.config.model import Gpt2Config, pad_vocab

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


def flops_per_token(config: Gpt2Config, vocab_size: int) -> float:
    """FLOPs of forward and backward for one token: 6 for each weight in a matrix product, and attention's.

    Attention costs 12 * layers * embed * seq_len, as PaLM's appendix B (arXiv 2204.02311) counts it. Recomputation and
    curvature are not counted: they are not the model's.
    """
    width = config.embed_dim
    rows = pad_vocab(config.embedding_rows(vocab_size))
    weights = config.num_layers * (4 + 2 * config.mlp_ratio) * width**2 + rows * width
    return 6.0 * weights + 12.0 * config.num_layers * width * config.seq_len


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
