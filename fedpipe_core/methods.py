"""Methods: what each trains and exchanges, and in which sizes the uniform ones are planned.

A method is a form, which `forms` builds and judges (low-rank adapters, every parameter, bottlenecks), the shape that
the cost model sees, and sizes. All share rounds, store, wire format, checks and aggregation: what travels is an
`Adapter`, factors per module and tensors that are averaged as they are. Imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedpipe_core.config import Bits, FederationConfig
from fedpipe_core.config_methods import Method
from fedpipe_core.planning_checks import check_menu
from fedpipe_core.profile_schemas import ModelShape, ModuleShape

Form = Literal["lora", "whole", "bottleneck"]
Ranks = dict[str, int]
BOTTLENECK = ".bottleneck"  # follows the name of the module behind whose output it lies


@dataclass(frozen=True)
class MethodTraits:
    """What tells one method from another.

    `shape` turns the base's shape into what this method puts on it; `sizes` are the ranks that all edges may get alike,
    largest first, and None where every edge has a plan of its own. `bits` are the base widths it can train on. `trials`
    says that sizes change from round to round by what edges tried; `unreleased` why it has no release.
    """

    form: Form
    shape: Callable[[ModelShape], ModelShape]
    sizes: Callable[[ModelShape, FederationConfig], Sequence[Ranks]] | None = None
    what: str = "adapters"
    bits: tuple[Bits, ...] = (32, 16, 8, 4)
    trials: bool = False
    unreleased: str = ""


def matrices(shape: ModelShape) -> ModelShape:
    """Adapters lie on the base's matrices."""
    return shape


def every_parameter(shape: ModelShape) -> ModelShape:
    """All parameters are trained and travel as the head does."""
    everything = shape.linear_parameters + shape.other_parameters + shape.head_parameters
    return shape.model_copy(
        update={"linear_parameters": 0, "other_parameters": 0, "head_parameters": everything, "hidden_features": 0}
    )


def bottleneck_places(shape: ModelShape) -> ModelShape:
    """Two bottlenecks a block, behind its attention and behind its feed-forward part (Houlsby et al., 1902.00751).

    A place is named after the matrix that closes the part: the block's last, and of those in the attention the last
    that is as wide. Each takes and gives that width, and keeps what goes into and out of its activation.
    """
    places = {}
    for layer in range(shape.num_blocks):
        block = {name: module for name, module in shape.modules.items() if module.layer == layer}
        width = list(block.values())[-1].out_features
        inside = [n for n in attention_projections(shape) if n in block and block[n].out_features == width]
        for name in dict.fromkeys([*inside[-1:], list(block)[-1]]):
            places[name + BOTTLENECK] = ModuleShape(out_features=width, in_features=width, layer=layer, inner_values=2)
    return shape.model_copy(update={"modules": places, "matrices": shape.modules})


def attention_projections(shape: ModelShape) -> list[str]:
    """Modules of an attention, which every architecture of transformers calls so; all modules where none is."""
    found = [name for name in shape.modules if "attn" in name.lower() or "attention" in name.lower()]
    return found or list(shape.modules)


def bottlenecks(shape: ModelShape, depth: int, width: int) -> Ranks:
    """Widths of the bottlenecks in the last `depth` blocks."""
    lowest = shape.num_blocks - depth
    return {name: width for name, place in shape.modules.items() if place.layer >= lowest}


def bottleneck_size(shape: ModelShape, ranks: Mapping[str, int]) -> tuple[int, int]:
    """Depth and width that `bottlenecks` was given."""
    lowest = min(shape.modules[name].layer for name, width in ranks.items() if width)
    return shape.num_blocks - lowest, max(ranks.values())


def _ranks_on_attention(shape: ModelShape, config: FederationConfig) -> list[Ranks]:
    modules = attention_projections(shape)
    return [dict.fromkeys(modules, rank) for rank in sorted(check_menu(shape, config), reverse=True)]


def _no_ranks(shape: ModelShape, config: FederationConfig) -> list[Ranks]:
    del shape, config
    return [{}]


def _first_bottlenecks(shape: ModelShape, config: FederationConfig) -> list[Ranks]:
    spec = config.fedadapter
    return [bottlenecks(shape, min(spec.depth, shape.num_blocks), spec.width)]


METHODS: dict[Method, MethodTraits] = {
    "fedpipe": MethodTraits("lora", matrices),
    "fedlora": MethodTraits("lora", matrices, _ranks_on_attention, "attention projections"),
    "full": MethodTraits("whole", every_parameter, _no_ranks, "every parameter", bits=(32,)),
    "fedadapter": MethodTraits(
        "bottleneck",
        bottleneck_places,
        _first_bottlenecks,
        "bottlenecks",
        trials=True,
        unreleased="its bottlenecks have an activation inside, so no weight takes them up and no library loads them",
    ),
}


def method_shape(shape: ModelShape, config: FederationConfig) -> ModelShape:
    """The base's shape with what the configured method trains."""
    return METHODS[config.method].shape(shape)
