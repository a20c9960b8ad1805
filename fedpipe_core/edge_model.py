"""One edge's instance of the base: what it trains, and how the global adapter gets into it and out again.

Built once per federation; each round loads the global adapter into it and reads back what was trained. Here it carries
low-rank adapters of the planned ranks, a frozen tail beside them, and a head of its own; `forms` has the other kinds.
Instances made from one `Base` share its frozen tensors, so N edges in a process hold one base.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpipe_core.adapters import Adapter
from fedpipe_core.architecture import adaptable_modules, head_modules, head_parameters
from fedpipe_core.low_rank import LowRank
from fedpipe_core.model import device_of, share

TRAINED = "default"  # PEFT's usual name, so that its own tools find the adapter
TAIL = "tail"


Factors = tuple[nn.Parameter, nn.Parameter]


@dataclass(frozen=True, eq=False)
class EdgeModel:
    """A model and what of it is trained: factors B and A by module, and parameters that travel whole, by name.

    `scaling` = alpha / rank of every trained adapter. Of a parameter in `origin` the change from that value travels.
    `tuner` switches PEFT's adapters, where there are any. `trains_right` tells whether both factors are trained or B
    alone.
    """

    model: nn.Module
    factors: Mapping[str, Factors]
    dense: Mapping[str, nn.Parameter]
    scaling: float = 1.0
    tuner: Any = None
    tail_ranks: Mapping[str, int] = field(default_factory=dict)
    origin: Mapping[str, Tensor] = field(default_factory=dict)
    trains_right: bool = True

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every trained adapter."""
        return {name: A.shape[0] for name, (_, A) in self.factors.items()}

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained at the base rate: factors (B and A, or B alone), and parameters that are none of the head."""
        trained, head = slice(None) if self.trains_right else slice(1), head_parameters(self.model)
        parameters = [parameter for pair in self.factors.values() for parameter in pair[trained]]
        return parameters + [parameter for name, parameter in self.dense.items() if name not in head]

    def head_parameters(self) -> list[nn.Parameter]:
        """The head, trained in full."""
        return list(head_parameters(self.model).values())


def build_edge_model(
    base: nn.Module,
    ranks: Mapping[str, int],
    rank_cap: int,
    scaling: float,
    checkpointing: bool = False,
    modules: Iterable[str] | None = None,
) -> EdgeModel:
    """Put adapters of the planned ranks on a shared copy of the base, with room for a frozen tail up to `rank_cap`.

    `modules` are those the global adapter has; all that can carry an adapter when left out.
    """
    from peft import LoraModel

    names = list(adaptable_modules(base) if modules is None else modules)
    model = share(base)
    own_head(model)
    tail_ranks = {name: rank_cap - ranks.get(name, 0) for name in names if rank_cap > ranks.get(name, 0)}
    tuner = LoraModel(model, _lora_config(ranks, scaling), TRAINED)
    if tail_ranks:
        tuner.peft_config[TAIL] = _lora_config(tail_ranks, 1.0)
        tuner.inject_adapter(model, TAIL)
    if checkpointing:
        checkpoint_blocks(model)
    _keep_factors_in_float32(model, {TRAINED: ranks, TAIL: tail_ranks})
    factors = {name: _factors(model, name, TRAINED) for name in ranks}
    return ready(EdgeModel(model, factors, head_parameters(model), scaling, tuner, tail_ranks))


def ready(edge: EdgeModel) -> EdgeModel:
    """The same instance, in which exactly what is trained takes gradients."""
    _activate(edge, tail=False)
    return edge


def with_frozen_right_factors(edge: EdgeModel) -> EdgeModel:
    """The same instance, to be loaded anew, whose A stays as loaded: only B and the head are trained (2403.12313)."""
    return ready(replace(edge, trains_right=False))


def load_adapter(edge: EdgeModel, trained: Adapter, tail: Mapping[str, LowRank]) -> None:
    """Load what `split_for_edge` made of the global adapter. An empty tail costs nothing in the forward pass.

    A tail may be larger than the room it was given, since flora_stack never truncates; the room grows with it.
    """
    with torch.no_grad():
        for name, parameters in edge.factors.items():
            factors = trained.factors[name]
            _fill(parameters, LowRank(factors.B / edge.scaling, factors.A))
        for name in edge.tail_ranks:
            if name in tail:
                _make_room(edge.model, name, tail[name].rank)
            _fill(_factors(edge.model, name, TAIL), tail.get(name))
        _load_dense(edge, trained)
    _activate(edge, tail=bool(tail))


def read_adapter(edge: EdgeModel) -> Adapter:
    """What was trained, with the scaling folded into B, as float32 on the CPU."""
    factors = {name: LowRank(_to_cpu(B) * edge.scaling, _to_cpu(A)) for name, (B, A) in edge.factors.items()}
    dense = {name: _to_cpu(value) for name, value in edge.dense.items()}
    for name, value in edge.origin.items():
        dense[name] -= _to_cpu(value)
    return Adapter(factors, dense)


def build_global_model(base: nn.Module, rank_cap: int) -> EdgeModel:
    """An instance that only evaluates: every module carries the whole global adapter, the tail stays empty."""
    ranks = dict.fromkeys(adaptable_modules(base), rank_cap)
    return build_edge_model(base, ranks, rank_cap, scaling=1.0)


def load_global_adapter(edge: EdgeModel, adapter: Adapter) -> None:
    """Load a whole adapter, of any ranks up to those of the instance, into one made by `build_global_model`."""
    with torch.no_grad():
        for name, parameters in edge.factors.items():
            _fill(parameters, adapter.factors.get(name))
        _load_dense(edge, adapter)


def _load_dense(edge: EdgeModel, adapter: Adapter) -> None:
    for name, parameter in edge.dense.items():
        parameter.copy_(adapter.head[name])
        if name in edge.origin:
            parameter.add_(edge.origin[name])


def checkpoint_blocks(model: Any) -> None:
    """Recompute blocks in the backward pass.

    They do so in training mode only, which their parts must not follow: some would draw random numbers.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # else gradients flow through the blocks below the lowest adapter as well
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _lora_config(ranks: Mapping[str, int], scaling: float) -> Any:
    from peft import LoraConfig

    largest = max(ranks.values())
    return LoraConfig(
        r=largest,
        lora_alpha=scaling * largest,
        lora_dropout=0.0,
        target_modules=list(ranks),
        # PEFT reads the keys as regular expressions, so names are escaped.
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern={re.escape(name): scaling * rank for name, rank in ranks.items()},
    )


def own_head(model: nn.Module) -> None:
    """Give the instance float32 head parameters of its own, and let the head take inputs of any dtype."""
    for name in head_modules(model):
        module = model.get_submodule(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
        module.register_forward_pre_hook(_cast_to_float)


def _cast_to_float(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


def _activate(edge: EdgeModel, tail: bool) -> None:
    """Choose the adapters that take part in the forward pass, and what is trained."""
    if edge.tuner is not None:
        edge.tuner.set_adapter([TRAINED, TAIL] if tail and edge.tail_ranks else TRAINED)
    edge.model.requires_grad_(False)
    for parameter in (*edge.adapter_parameters(), *edge.head_parameters()):
        parameter.requires_grad_(True)


def _factors(model: nn.Module, name: str, adapter: str) -> Factors:
    layer = model.get_submodule(name)
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight  # type: ignore[index, union-attr]


def _keep_factors_in_float32(model: nn.Module, adapters: Mapping[str, Iterable[str]]) -> None:
    """PEFT gives factors the dtype of a dense weight; in bfloat16 most steps of an optimizer would round to nothing."""
    for adapter, names in adapters.items():
        for name in names:
            for factor in _factors(model, name, adapter):
                factor.data = factor.data.float()


def _fill(parameters: Factors, factors: LowRank | None) -> None:
    """Copy factors into a layer's; components beyond theirs are zero."""
    B, A = parameters
    B.zero_()
    A.zero_()
    if factors is not None:
        B[:, : factors.rank] = factors.B.to(B)
        A[: factors.rank] = factors.A.to(A)


def _make_room(model: nn.Module, name: str, rank: int) -> None:
    """Replace a layer's tail by one of `rank` components when it has fewer."""
    layer: Any = model.get_submodule(name)
    B, A = _factors(model, name, TAIL)
    if A.shape[0] < rank:
        layer.lora_B[TAIL].weight = nn.Parameter(B.new_zeros(B.shape[0], rank), requires_grad=False)
        layer.lora_A[TAIL].weight = nn.Parameter(A.new_zeros(rank, A.shape[1]), requires_grad=False)


def _to_cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def move_batch(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device."""
    device = device_of(model)
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """Number of scalars."""
    return sum(parameter.numel() for parameter in parameters)
