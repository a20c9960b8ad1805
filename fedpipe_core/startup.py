"""What large libraries cost a process at its start beside their work, how much of that is spared, and what they print.

An edge and a coordinator import torch, transformers, peft and bitsandbytes before their first step. A fifth of the CPU
seconds that takes went into collecting garbage that imports do not leave.
"""

import functools
import gc
import logging
import os
import warnings
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


def quiet_transformers() -> None:
    """Keep progress bars, load reports, and warnings that ask for nothing off the user's terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")  # its successor is newer
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT reads it
