"""Giving memory back."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Have the C library give to the system what is free.

    Texts come and go in sizes of their own, and glibc keeps the gaps between them: without this a process that prepares
    a long text grows by a third in its first minute.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)
