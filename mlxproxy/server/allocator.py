"""Memory that is free goes back to the system, where the C library would keep it.

glibc gives each thread a heap of its own, up to eight for each core, and lets each keep what it
once needed; and with every large block that is freed it keeps larger ones (mallopt(3), "dynamic
mmap threshold"). With hundreds of threads and bodies of many megabytes that is a gigabyte. Told
these values, it returns a large block when it is freed. Other C libraries do so by themselves.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3), from its <malloc.h>, and what they are set to.
M_MMAP_THRESHOLD, LARGE = -3, 256 << 10  # bytes from which a block is mapped for itself
M_ARENA_MAX, HEAPS = -8, 2


def return_what_is_free() -> bool:
    """Set glibc so, for this process and before it has threads; return whether it is glibc's."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl, for one, has another allocator
        return False
    return all(
        library.mallopt(parameter, value) == 1
        for parameter, value in ((M_MMAP_THRESHOLD, LARGE), (M_ARENA_MAX, HEAPS))
    )
