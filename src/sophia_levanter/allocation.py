"""Settings of glibc's malloc for freed memory; no effect with other C libraries."""

from __future__ import annotations

import ctypes
import sys

# Values of mallopt's parameters (glibc's malloc.h) that keep a step's buffers allocated between steps.
_KEEP = {
    -4: 0,  # M_MMAP_MAX: large buffers come from the heap, too
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: the free end of the heap is not given back
    -2: 2**28,  # M_TOP_PAD: the heap grows by this much at a time
    -8: 1,  # M_ARENA_MAX: one heap for all threads
}


def keep_freed_memory() -> None:
    """Have malloc keep freed memory for the process, for programs that allocate the same large buffers again and again.

    By default glibc returns every large buffer to the system. A training step on a CPU then spends a tenth to a quarter
    of its time on page faults. Call this before the first thread starts, since existing arenas remain.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        for parameter, value in _KEEP.items():
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """Have malloc return free memory to the system.

    Freed texts of different sizes leave gaps that glibc keeps. Without this call a process that prepares a long text
    grows by a third in its first minute.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of the C library; None if it lacks the function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
