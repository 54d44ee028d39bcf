"""What glibc's allocator does, seen from outside, in processes of their own."""

import platform
import subprocess
import sys

import pytest

import sophia_levanter.allocation as allocation

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt and malloc_trim are glibc's")
# Allocates and frees 64 MiB again and again, and prints how many pages were faulted in after the first time.
FAULTS = """
import ctypes, resource, sys
from sophia_levanter.allocation import keep_freed_memory, return_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 64 << 20
for turn in range(5):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = libc.malloc(size)
    libc.memset(buffer, 1, size)
    libc.free(buffer)
    if "return" in sys.argv:
        return_freed_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*words):
    return int(
        subprocess.run([sys.executable, "-c", FAULTS, *words], capture_output=True, text=True, check=True).stdout
    )


LEAST = 4 * (64 << 20) // 4096 / 512  # page faults of four buffers that are returned, with huge pages at most


@glibc
def test_freed_buffers_are_kept():
    assert page_faults() >= LEAST
    assert page_faults("keep") < 50


@glibc
def test_kept_memory_can_be_returned_all_the_same():
    assert page_faults("keep", "return") >= LEAST


@pytest.mark.parametrize("name", ["keep_freed_memory", "return_freed_memory"])
def test_another_c_library_is_left_alone(name, monkeypatch):
    class NoFunctions:
        pass

    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda _: NoFunctions())
    getattr(allocation, name)()
    monkeypatch.setattr(allocation.sys, "platform", "darwin")
    monkeypatch.setattr(allocation.ctypes, "CDLL", None)
    getattr(allocation, name)()
