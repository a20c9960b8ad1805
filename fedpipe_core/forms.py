"""What a method trains, as instances of the base: low-rank adapters, every parameter, or bottlenecks.

Each form says how an edge's instance is built, what the first global adapter is, and which model a global adapter
makes of the base, to be judged and, where it can be, released. Loading and reading an instance is `edge_model`'s, for
all forms alike.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpipe_core.adapters import Adapter, initial_adapter
from fedpipe_core.architecture import head_parameters, linear_size
from fedpipe_core.edge_model import (
    EdgeModel,
    build_edge_model,
    checkpoint_blocks,
    load_adapter,
    own_head,
    ready,
    with_frozen_right_factors,
)
from fedpipe_core.low_rank import LowRank
from fedpipe_core.merging import merge
from fedpipe_core.methods import BOTTLENECK, Form
from fedpipe_core.model import share
from fedpipe_core.profile_schemas import ModuleShape

Shapes = Mapping[str, ModuleShape]


@dataclass(frozen=True)
class InstanceSpec:
    """What an edge's instance is to carry; `tail_cap` is the rank up to which what it does not train is frozen."""

    ranks: Mapping[str, int]
    modules: Collection[str]
    tail_cap: int
    scaling: float
    checkpointing: bool = False
    frozen_right: bool = False


@dataclass(frozen=True)
class FormFunctions:
    """How one form is built, begun and judged.

    `first` takes the base, the shapes of what may carry adapters, the ranks that are trained first, and a seed.
    """

    build: Callable[[nn.Module, InstanceSpec], EdgeModel]
    first: Callable[[nn.Module, Shapes, Mapping[str, int], int], Adapter]
    judged: Callable[[nn.Module, Adapter], nn.Module]


def _build_lora(base: nn.Module, spec: InstanceSpec) -> EdgeModel:
    edge = build_edge_model(base, spec.ranks, spec.tail_cap, spec.scaling, spec.checkpointing, spec.modules)
    return with_frozen_right_factors(edge) if spec.frozen_right else edge


def _first_lora(base: nn.Module, shapes: Shapes, ranks: Mapping[str, int], seed: int) -> Adapter:
    """B = 0 on every module any edge trains, and the untrained head."""
    planned = {name: shape for name, shape in shapes.items() if name in ranks}
    return initial_adapter(planned, max(ranks.values()), _head_values(base), seed)


def _build_whole(base: nn.Module, spec: InstanceSpec) -> EdgeModel:
    """Every parameter the instance's own; what travels is its change from the base, so that rounding costs little."""
    del spec
    model = share(base)
    _own_parameters(model)
    return ready(EdgeModel(model, {}, dict(model.named_parameters()), origin=dict(base.named_parameters())))


def _first_whole(base: nn.Module, shapes: Shapes, ranks: Mapping[str, int], seed: int) -> Adapter:
    """Nothing changed yet."""
    del shapes, ranks, seed
    return Adapter({}, {name: torch.zeros(value.shape, dtype=torch.float32) for name, value in base.named_parameters()})


def _judged_whole(base: nn.Module, adapter: Adapter) -> nn.Module:
    edge = _build_whole(base, InstanceSpec({}, (), 0, 1.0))
    load_adapter(edge, adapter, {})
    return edge.model.requires_grad_(False)


class Bottleneck(nn.Module):
    """y + scaling·B·silu(A·y), with A (width, features) and B (features, width): the identity where B is zero.

    The module of Houlsby et al. (arXiv 1902.00751, figure 2) without biases, so that a component is one row of A and
    one column of B, as in a low-rank adapter.
    """

    def __init__(self, features: int, width: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.B = nn.Parameter(torch.zeros(features, width, dtype=torch.float32))
        self.A = nn.Parameter(torch.zeros(width, features, dtype=torch.float32))

    def forward(self, value: Tensor) -> Tensor:
        """Shapes (…, features) to the same."""
        inner = functional.silu(functional.linear(value.to(self.A.dtype), self.A))
        return value + (functional.linear(inner, self.B) * self.scaling).to(value.dtype)


def _build_bottlenecks(base: nn.Module, spec: InstanceSpec) -> EdgeModel:
    """Bottlenecks behind the outputs of the modules they are named after."""
    model = share(base)
    own_head(model)
    factors = {}
    for place, width in spec.ranks.items():
        carrier = model.get_submodule(place.removesuffix(BOTTLENECK))
        weight = carrier.get_parameter("weight")
        bottleneck = Bottleneck(_out_features(carrier), width, spec.scaling).to(weight.device)
        carrier.add_module(BOTTLENECK.lstrip("."), bottleneck)
        carrier.register_forward_hook(_through_bottleneck)
        factors[place] = (bottleneck.B, bottleneck.A)
    if spec.checkpointing:
        checkpoint_blocks(model)
    return ready(EdgeModel(model, factors, head_parameters(model), spec.scaling))


def _through_bottleneck(carrier: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del inputs
    value: Tensor = carrier.bottleneck(output)  # type: ignore[operator]
    return value


def _first_bottlenecks(base: nn.Module, shapes: Shapes, ranks: Mapping[str, int], seed: int) -> Adapter:
    """B = 0 on the first bottlenecks, width 0 on those that may come, and the untrained head."""
    begun = initial_adapter({name: shapes[name] for name in ranks}, max(ranks.values()), _head_values(base), seed)
    later = {name: _without_width(shape) for name, shape in shapes.items() if name not in ranks}
    return Adapter({**begun.factors, **later}, begun.head)


def _without_width(shape: ModuleShape) -> LowRank:
    B, A = (shape.out_features, 0), (0, shape.in_features)
    return LowRank(torch.zeros(B, dtype=torch.float32), torch.zeros(A, dtype=torch.float32))


def _judged_bottlenecks(base: nn.Module, adapter: Adapter) -> nn.Module:
    ranks = {name: rank for name, rank in adapter.ranks.items() if rank}
    edge = _build_bottlenecks(base, InstanceSpec(ranks, (), 0, 1.0))
    load_adapter(edge, adapter, {})
    return edge.model.requires_grad_(False)


def _head_values(base: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu() for name, value in head_parameters(base).items()}


def _own_parameters(model: nn.Module) -> None:
    """Give a model float32 parameters of its own; what is one parameter in two places stays one."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in copies:
                copies[parameter] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            setattr(module, leaf, copies[parameter])


def _out_features(carrier: nn.Module) -> int:
    size = linear_size(carrier)
    assert size is not None, "bottlenecks are planned behind linear maps"
    return size[0]


FORMS: dict[Form, FormFunctions] = {
    "lora": FormFunctions(_build_lora, _first_lora, merge),
    "whole": FormFunctions(_build_whole, _first_whole, _judged_whole),
    "bottleneck": FormFunctions(_build_bottlenecks, _first_bottlenecks, _judged_bottlenecks),
}
