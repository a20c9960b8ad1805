import platform

import psutil
import pytest
import torch

from fedpipe_core.allocator import return_freed_memory

BLOCK = 4 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_freed_tensors_between_kept_ones_return_to_the_system():
    return_freed_memory()
    process = psutil.Process()
    for _ in range(2):  # left alone, glibc maps blocks the first time and takes them from its heap the second time
        tensors = [torch.ones(BLOCK // 4) for _ in range(32)]
        held = process.memory_info().rss
        kept = tensors[::2]
        del tensors
        assert held - process.memory_info().rss > 0.9 * 16 * BLOCK
        del kept
