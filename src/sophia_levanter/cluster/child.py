"""`python -m sophia_levanter.cluster.child PARENT -- COMMAND ...`: becomes a command that dies with its parent.

A launcher that is killed must not leave processes that train on without it, and hold the run's directory. Linux alone
can promise that, to the child; elsewhere the command is started without the promise.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def bound_to_this_process(words: Sequence[str]) -> list[str]:
    """The command line of a child of this process that runs another command line, and dies with this process."""
    return [sys.executable, "-m", "sophia_levanter.cluster.child", str(os.getpid()), "--", *words]


def main(parent: int, words: Sequence[str]) -> None:
    """Become the command; does not return."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.execvp(words[0], list(words))
    except OSError as error:
        sys.exit(f"error: {words[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3:])
