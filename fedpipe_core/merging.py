"""Low-rank changes written into the weights they change."""

import torch
from torch import nn

from fedpipe_core.adapters import Adapter
from fedpipe_core.model import share


def merge(base: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the dense base with W + B·A in place of W and the trained head; the base's own tensors stay."""
    model = share(base)
    with torch.no_grad():
        for name, factors in adapter.factors.items():
            module = model.get_submodule(name)
            weight = module.get_parameter("weight")
            change = factors.dense().to(weight.device)
            # GPT-2's Conv1D keeps its weight as (in_features, out_features).
            change = change if isinstance(module, nn.Linear) else change.T
            _replace(module, "weight", weight.float() + change)
        for name, value in adapter.head.items():
            module_name, _, leaf = name.rpartition(".")
            _replace(model.get_submodule(module_name), leaf, value)
    return model


def _replace(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    old = module.get_parameter(leaf)
    setattr(module, leaf, nn.Parameter(value.to(old), requires_grad=False))
