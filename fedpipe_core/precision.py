"""The number format in which a step computes, whatever the trained factors and the head are kept in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def computed_like(base: Any) -> AbstractContextManager[Any]:
    """Compute in the 16 bits of a base, though the factors and the head beside it are float32.

    PEFT alone would cast every module's input to float32, keep it, and multiply there, at a fraction of the speed.
    """
    embedding = base.get_input_embeddings().weight
    if embedding.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(embedding.device.type, embedding.dtype)
    return nullcontext()
