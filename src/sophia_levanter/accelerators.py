"""Published performance figures for accelerators. This module does not import jax.

None of these figures were measured by this project. TPU figures are from docs.cloud.google.com/tpu/docs (v4, v5e, v5p
and v6e), and GPU figures are from NVIDIA's data sheets for the A100, H100 and H200 (SXM), both as of November 2026.
Comments next to the figures cite other sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30
# `Chip.qr_flops` applies to matrices of this size.
QR_SIDE = 2048


@dataclass(frozen=True)
class Chip:
    """The performance figures of one device.

    Attributes:
        kinds: substrings of `Device.device_kind` that identify the chip.
        memory: memory available to a program, in bytes.
        memory_bandwidth: bandwidth between the chip and its memory, in bytes/s.
        peak_flops: peak dense bfloat16 FLOP/s.
        bandwidth: bandwidth to other chips in the same slice or node, in bytes/s in one direction over all links.
        network: bandwidth to other nodes or slices, in bytes/s in one direction.
        qr_flops: FLOP/s of a float32 QR decomposition of a `QR_SIDE` x `QR_SIDE` matrix; see `qr_rate` for other sizes.
        newton_schulz_flops: FLOP/s of float32 Newton-Schulz iterations at jax's default matmul precision.
        topology: the options that libtpu needs to compile for the chip; None for GPUs.
        longest_side: number of chips along the longest side of the largest slice.
        qr_measured: whether `qr_flops` is a published measurement for this kind of chip rather than an assumption.
    """

    kinds: tuple[str, ...]
    memory: float
    memory_bandwidth: float
    peak_flops: float
    bandwidth: float
    network: float
    qr_flops: float
    newton_schulz_flops: float
    topology: dict[str, Any] | None = None
    longest_side: int = 16
    qr_measured: bool = False

    def qr_rate(self, side: int) -> float:
        """Return the FLOP/s of a QR decomposition of a `side` x `side` matrix.

        Householder QR processes columns one after another, so its time grows more slowly than its FLOPs. It is assumed
        to grow as `side` ** 1.5. On an unnamed GPU, torch.linalg.qr took 0.61, 3.8 and 24 ms to compute only R for
        sides of 256, 1024 and 4096 (github.com/flagos-ai/FlagGems, pull request 5586). These times grow with an
        exponent of 1.3; computing Q as well adds matrix products.
        """
        return self.qr_flops * (side / QR_SIDE) ** 1.5


# Bandwidths are half the "bidirectional ICI bandwidth per chip" for v5p, v5e and v6e, and six links of 50 GB/s for v4
# (Jouppi et al. 2023, arXiv 2304.01433). Between slices, each chip has a share of its host's adapters: 50 Gb/s for v5p,
# 25 for v5e, 100 for v6e, and 50 for v4 (jax-ml.github.io/scaling-book/tpus). No figures have been published for XLA's
# QR on TPUs. A quarter of the A100's rate is assumed, because the loop over columns cannot use the matrix units.
# Newton-Schulz is assumed to reach half the peak, because float32 products take one bfloat16 pass by default.
_TPU_QR_FLOPS = 0.36e12
_ONE_CORE: dict[str, Any] = {"chips_per_host_bounds": (2, 2, 1)}
_MEGACORE = {"chip_config_name": "megacore", **_ONE_CORE}
TPUS = {
    "v4": Chip(("TPU v4",), 32 * GIB, 1200e9, 275e12, 300e9, 6.25e9, _TPU_QR_FLOPS, 137e12, _MEGACORE),
    "v5p": Chip(("TPU v5",), 95 * GIB, 2765e9, 459e12, 600e9, 6.25e9, _TPU_QR_FLOPS, 229e12, _MEGACORE, 28),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 16 * GIB, 819e9, 197e12, 200e9, 3.125e9, _TPU_QR_FLOPS, 98e12, _ONE_CORE),
    "v6e": Chip(("TPU v6",), 32 * GIB, 1638e9, 918e12, 400e9, 12.5e9, _TPU_QR_FLOPS, 459e12, _ONE_CORE),
}
# Memory excludes the memory used by the driver and its context. Bandwidths within a node are those of NVLink in one
# direction, half the 600 and 900 GB/s in the data sheets. Between nodes, each GPU is assumed to have its own adapter,
# as in NVIDIA's DGX: 200 Gb/s for an A100, 400 Gb/s for an H100 or H200. Many clouds provide a quarter of that or less.
# torch.linalg.qr of a 2048 x 2048 float32 matrix took 15.97 ms on an A100 (github.com/pytorch/pytorch, issue 151066;
# cuSOLVER, which jax also calls): 8/3 * 2048^3 FLOPs in that time is 1.43 TFLOP/s. The same rate is assumed for the
# H100 and H200. Newton-Schulz is assumed to reach half the peak rate of float32 products, which use TF32 by default;
# half the TF32 peak is a quarter of the bfloat16 peak.
_GPU_QR_FLOPS = 1.43e12
GPUS = {
    "a100-40": Chip(("A100",), 38 * GIB, 1555e9, 312e12, 300e9, 25e9, _GPU_QR_FLOPS, 78e12, qr_measured=True),
    "a100-80": Chip(("A100",), 77 * GIB, 2039e9, 312e12, 300e9, 25e9, _GPU_QR_FLOPS, 78e12, qr_measured=True),
    "h100": Chip(("H100",), 77 * GIB, 3350e9, 989e12, 450e9, 50e9, _GPU_QR_FLOPS, 247e12),
    "h200": Chip(("H200",), 138 * GIB, 4800e9, 989e12, 450e9, 50e9, _GPU_QR_FLOPS, 247e12),
}


def published_peak(device_kind: str) -> float | None:
    """Return the peak dense bfloat16 FLOP/s of a device, given its `device_kind`, or None if it is not listed."""
    peaks = {kind: chip.peak_flops for chip in (*TPUS.values(), *GPUS.values()) for kind in chip.kinds}
    # The longest match wins, because "TPU v5 lite" (v5e) contains "TPU v5" (v5p).
    found = max((kind for kind in peaks if kind in device_kind), key=len, default=None)
    return None if found is None else peaks[found]
