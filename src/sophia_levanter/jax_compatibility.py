"""What jax must have and do for this package; whatever imports haliax first imports this too.

Newer versions of jax lack a name that haliax uses. `tests/test_jax_compatibility.py` fails as soon as haliax no longer
needs it: then delete it here. haliax looks it up when its functions are called, and jax starts its platforms when the
first device is asked for, so the order of the imports does not matter.
"""

import contextlib
import os

import jax
from jax._src import hardware_utils
from jax.extend.backend import register_backend_factory

# Deprecated in jax 0.10, removed in 0.11. When haliax contracts axes it asks which of their sizes are known: integers,
# but not the symbols of an export with unknown sizes.
vars(jax.core).setdefault("is_constant_dim", lambda size: isinstance(size, int))


def skip_absent_tpu() -> None:
    """Keep jax from starting libtpu on a machine without a TPU, where it is installed to compile for TPUs.

    jax tries every platform that it knows, and libtpu then complains on stderr, from C++. TPUs are counted here as jax
    counts them when it is imported. Nothing changes on a machine that has one, or where JAX_PLATFORMS names platforms:
    the errors of a TPU that should be there are shown.
    """
    attached, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if not attached and not chosen and "JAX_FORCE_TPU_INIT" not in os.environ:
        # It is an error where jax has started one all the same.
        with contextlib.suppress(RuntimeError):
            register_backend_factory("tpu", _no_tpu, priority=300, fail_quietly=True)


def _no_tpu() -> None:
    raise RuntimeError("this machine has no TPU")


skip_absent_tpu()
