"""What one edge's training holds in memory, counted tensor by tensor.

On a CPU several edges share a process and its base, so the process's own size says nothing about one of them; what its
tensors take does, and it is what a process of the edge's own would hold beyond its libraries.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.activation_cost import saved_tensor_bytes
from fedpipe_core.batches import Batch
from fedpipe_core.edge_model import EdgeModel, move_batch
from fedpipe_core.losses import training_loss

OPTIMIZER_COPIES = 3  # gradient and AdamW's two moments beside every trained parameter


def training_memory_bytes(edge: EdgeModel, batch: Batch) -> int:
    """Bytes of weights, gradients, optimizer state and kept activations of one step; takes one forward pass."""
    trained = sum(value.nbytes for value in (*edge.adapter_parameters(), *edge.head_parameters()))
    moved = move_batch(batch, edge.model)
    kept, _ = saved_tensor_bytes(lambda: training_loss(edge.model, moved), edge.model.parameters())
    return held_bytes(edge.model) + OPTIMIZER_COPIES * trained + kept


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors a model holds, each storage once."""
    weights = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _held(model)}
    return sum(weights.values())


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor a model holds, with the scales of a quantized weight."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from _tensors_of(getattr(getattr(module, "weight", None), "quant_state", None))
        yield from _tensors_of(getattr(module, "state", None))


def _tensors_of(state: Any) -> Iterator[Tensor]:
    for value in getattr(state, "__dict__", {}).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "absmax"):  # the second level of double quantization
            yield from _tensors_of(value)
