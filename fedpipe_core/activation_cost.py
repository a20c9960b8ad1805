"""The bytes that autograd keeps for the backward pass, counted, and what they come to per token."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.architecture import adaptable_modules
from fedpipe_core.batches import Batch
from fedpipe_core.edge_model import move_batch
from fedpipe_core.losses import training_loss
from fedpipe_core.probe_steps import reached_to_the_first_block
from fedpipe_core.profile_schemas import ActivationCost


def measured_activation_cost(base: nn.Module, small: Batch, large: Batch) -> ActivationCost:
    """Count the bytes kept for the backward pass at two batch sizes, and what an adapter on each module adds.

    Exact, and costs two forward passes: tensors are counted as autograd saves them, each storage once.
    """
    model = reached_to_the_first_block(base)
    inputs: dict[str, Tensor] = {}
    for name in adaptable_modules(model):
        model.get_submodule(name).register_forward_pre_hook(_remember_input(inputs, name))
    (few, few_bytes, _), (many, many_bytes, kept) = (_saved_bytes(model, batch) for batch in (small, large))
    per_token = max(0.0, (many_bytes - few_bytes) / max(1, many - few))
    return ActivationCost(
        fixed_bytes=max(0, round(few_bytes - per_token * few)),
        per_token_bytes=per_token,
        per_token_module_bytes={name: _unkept_bytes(value, kept) / many for name, value in inputs.items()},
    )


def saved_tensor_bytes(forward: Callable[[], Any], ignored: Iterable[Tensor] = ()) -> tuple[int, set[int]]:
    """Bytes that autograd keeps while `forward` runs, each storage once, and the storages themselves by address."""
    skipped = {tensor.untyped_storage().data_ptr() for tensor in ignored}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation that keeps its own result would hold itself, and all before it, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept alive until counted, so that no address is used twice
    del result
    return sum(kept.values()), set(kept)


def _saved_bytes(model: nn.Module, batch: Batch) -> tuple[int, int, set[int]]:
    moved = move_batch(batch, model)
    size, kept = saved_tensor_bytes(lambda: training_loss(model, moved), model.parameters())
    return batch["input_ids"].numel(), size, kept


def _remember_input(inputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def remember(module: nn.Module, values: tuple[Tensor, ...]) -> None:
        inputs[name] = values[0]

    return remember


def _unkept_bytes(value: Tensor, kept: set[int]) -> int:
    """An adapter needs its module's input in the backward pass; it costs nothing where the base keeps it anyway."""
    storage = value.untyped_storage()
    return 0 if storage.data_ptr() in kept else storage.nbytes()
