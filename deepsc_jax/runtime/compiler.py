"""Host memory that a process no longer needs."""

import ctypes
import gc
import sys


def give_back() -> None:
    """Give the system the memory that was freed; call it once a program has been compiled.

    glibc keeps what tracing and compiling took, of a train step about a GiB. Does nothing but
    collect garbage where the C library cannot be asked to.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
