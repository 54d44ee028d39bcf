"""Adjustments to jax that this package needs. Every module that imports haliax also imports this module.

Newer versions of jax lack a name that haliax uses. `tests/test_jax_compatibility.py` fails once haliax no longer needs
the name, which should then be removed here. haliax looks up the name when its functions are called, and jax initializes
its platforms when the first device is requested, so the order of imports does not matter.
"""

import contextlib
import os

import jax
from jax._src import hardware_utils
from jax.extend.backend import register_backend_factory

# Deprecated in jax 0.10 and removed in 0.11. haliax calls it when contracting axes, to distinguish known sizes
# (integers) from the symbolic sizes used by jax.export.
vars(jax.core).setdefault("is_constant_dim", lambda size: isinstance(size, int))


def skip_absent_tpu() -> None:
    """Prevent jax from starting libtpu on a machine without a TPU.

    libtpu may be installed on such a machine to compile for TPUs. jax tries every known platform, and libtpu then
    prints errors to stderr from C++. This function detects TPUs in the same way as jax does on import. It does nothing
    if the machine has a TPU or JAX_PLATFORMS is set, so that errors from a malfunctioning TPU are still shown.
    """
    attached, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not attached and not chosen and "JAX_FORCE_TPU_INIT" not in os.environ:
        # A RuntimeError means that jax has already started a TPU.
        with contextlib.suppress(RuntimeError):
            register_backend_factory("tpu", _no_tpu, priority=300, fail_quietly=True)


def _no_tpu() -> None:
    raise RuntimeError("this machine has no TPU")


skip_absent_tpu()
