"""What large libraries cost a process at its start beside their work, and how most of that is spared.

An edge and a coordinator import torch, transformers, peft and bitsandbytes before their first step. Of 5.1 CPU seconds
that took, one went into collecting garbage that imports do not leave, and one into a compiler that is turned off.
"""

import functools
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
    with quick_imports(), _without_compiler():
        import peft  # noqa: F401  brings transformers' models and bitsandbytes
    gc.freeze()  # before a base is in memory, which has to be freed when it is let go


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Take torch's compiler away while it is turned off (TORCHDYNAMO_DISABLE).

    bitsandbytes has it compile three functions at import: they stay as they are then, but the compiler is loaded.
    """
    import torch

    compiler = torch.compile
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        vars(torch)["compile"] = _uncompiled
    try:
        yield
    finally:
        vars(torch)["compile"] = compiler


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """`torch.compile`, as a function or as a decorator with options, where nothing is compiled."""
    return (lambda found: found) if function is None else function
