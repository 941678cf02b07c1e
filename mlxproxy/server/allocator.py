"""Settings for glibc's allocator, so that it returns freed memory to the system.

glibc gives each thread a heap of its own, up to eight per core, and each heap keeps the memory it
once needed. Each large block that is freed also raises the size from which glibc returns blocks
(mallopt(3), "dynamic mmap threshold"). With hundreds of threads and bodies of many megabytes, that
adds up to a gigabyte. With the values below, glibc returns a large block when it is freed. Other C
libraries do so by themselves.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3), from its <malloc.h>, and their values here.
M_MMAP_THRESHOLD, LARGE = -3, 256 << 10  # bytes from which a block gets a mapping of its own
M_ARENA_MAX, HEAPS = -8, 2


def return_what_is_free() -> bool:
    """Configure glibc for this process, before it has threads; return whether that succeeded.

    The result is False for any other C library.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl, for example, has another allocator
        return False
    return all(
        library.mallopt(parameter, value) == 1
        for parameter, value in ((M_MMAP_THRESHOLD, LARGE), (M_ARENA_MAX, HEAPS))
    )
