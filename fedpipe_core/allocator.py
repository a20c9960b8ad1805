"""How the C library hands out and takes back the memory of tensors on a CPU.

glibc keeps freed tensors on its heap, and up to version 2.37 an aligned request cannot reuse a freed block of its own
size: a step then holds about twice what its tensors take. Blocks mapped one by one return to the system when freed,
so a process holds what its tensors hold and a predicted peak can be kept. Each new block costs page faults; huge
pages (`THP_MEM_ALLOC_ENABLE`, which torch reads at its first tensor and the package sets) pay most of them back.
"""

import ctypes
import platform

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MAPPED_BYTES = 2 * 2**20  # a huge page: a larger block costs few page faults, a smaller one is reused in numbers


def return_freed_memory() -> None:
    """Have large blocks mapped one by one from now on; on a system without glibc nothing changes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
