"""What the commands on trained models have in common."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from sophia_levanter.exit_status import FAILURE, INTERRUPTED


def failing_in_one_line(work: Callable[[], int]) -> int:
    """The status that work gives; 1 and one line where checkpoints are damaged or the devices fail or have no memory.

    Imports jax: for what comes after the command line is read.
    """
    from jax.errors import JaxRuntimeError

    from sophia_levanter.checkpoint import CheckpointError

    try:
        return work()
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
    except JaxRuntimeError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
    except KeyboardInterrupt:
        # Python's way out would tear down what the devices are at work on, and die of it.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    return FAILURE
