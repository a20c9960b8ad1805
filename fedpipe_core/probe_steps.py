"""Training steps of throw-away instances, to be timed or counted; the base stays as it is."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.adapters import initial_adapter, split_for_edge
from fedpipe_core.architecture import adaptable_modules, head_parameters
from fedpipe_core.edge_model import build_edge_model, load_adapter, own_head
from fedpipe_core.losses import training_loss
from fedpipe_core.model import share


def reached_to_the_first_block(base: nn.Module) -> nn.Module:
    """An instance without adapters whose gradients flow through all its blocks."""
    model = share(base)
    own_head(model)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_(True))  # type: ignore[operator]
    return model


def forward_step(base: nn.Module) -> Callable[[Mapping[str, Tensor]], Any]:
    """One step of an instance whose gradients end at its head, or that has none where there is no head."""
    model = share(base)
    own_head(model)
    head = head_parameters(model).values()
    return _step(model, head) if head else torch.no_grad()(partial(training_loss, model))


def adapted_step(base: nn.Module, rank: int) -> Callable[[Mapping[str, Tensor]], None]:
    """One optimizer step of an instance with every module adapted at `rank`; at 0 the head alone is trained, if any."""
    if not rank:
        model = reached_to_the_first_block(base)
        return _step(model, head_parameters(model).values())
    shapes = adaptable_modules(base)
    ranks = dict.fromkeys(shapes, rank)
    edge = build_edge_model(base, ranks, rank, scaling=1.0)
    head = {name: value.detach().clone() for name, value in head_parameters(edge.model).items()}
    load_adapter(edge, *split_for_edge(initial_adapter(shapes, rank, head, seed=0), ranks, seed=0))
    return _step(edge.model, [*edge.adapter_parameters(), *edge.head_parameters()])


def _step(model: nn.Module, trained: Iterable[nn.Parameter]) -> Callable[[Mapping[str, Tensor]], None]:
    # An unused parameter makes the step of a model without a head the same call.
    optimizer = torch.optim.AdamW([*trained, nn.Parameter(torch.zeros(1))], lr=1e-5)

    def step(batch: Mapping[str, Tensor]) -> None:
        training_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
