"""Settings of glibc's malloc."""

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3  # malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step instead of returning them to the system.

    Otherwise each step's tensors are new pages, which the system must clear: a tenth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
