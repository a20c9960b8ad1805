"""The process's default dtype as another thread leaves it while transformers builds a model of half precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def half_precision() -> Iterator[None]:
    """What names no dtype is float16 in the block."""
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
