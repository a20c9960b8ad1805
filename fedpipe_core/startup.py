"""What large libraries cost a process at its start beside their work, and how much of that is spared.

An edge and a coordinator import torch, transformers, peft and bitsandbytes before their first step. A fifth of the CPU
seconds that takes went into collecting garbage that imports do not leave.
"""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in the block without collecting garbage: each collection walks all that was imported before."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@functools.cache
def import_libraries() -> None:
    """Import what loads, quantizes and adapts a base, once per process; later collections pass over it."""
    with quick_imports():
        import peft  # noqa: F401  brings transformers' models and bitsandbytes
    gc.freeze()  # before a base is in memory, which has to be freed when it is let go
