"""What the planner refuses before it plans: profiles that are nonsense, and pins or menus that cannot be."""

import math
from collections.abc import Iterable

from fedpipe_core.config import FederationConfig, PlanPin
from fedpipe_core.errors import PlanError
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape


def check_profile(profile: EdgeProfile, shape: ModelShape) -> None:
    """Raise PlanError, naming the edge and the value, for a profile no machine can have or of another model."""
    faults = [*_number_faults(profile), *_module_faults(profile, shape)]
    if faults:
        raise PlanError(f"{profile.edge_id}: its profile is refused: {'; '.join(faults)}; profile the edge again")


def check_pin(edge_id: str, pin: PlanPin, shape: ModelShape, config: FederationConfig) -> None:
    """Raise PlanError for pinned ranks that the model or the global adapter cannot carry."""
    cap = config.aggregation.rank_cap
    for module, rank in (pin.ranks or {}).items():
        if module not in shape.modules:
            raise PlanError(
                f"{edge_id}: pin.ranks names {module!r}, which is no adaptable module of the model; "
                f"its modules are like {next(iter(shape.modules))!r}"
            )
        limit = min(cap, shape.modules[module].out_features, shape.modules[module].in_features)
        if not 1 <= rank <= limit:
            raise PlanError(
                f"{edge_id}: pin.ranks gives {module!r} rank {rank}, needed 1 to {limit} "
                f"(aggregation.rank_cap is {cap}); change the pin"
            )
    if pin.ranks == {}:
        raise PlanError(f"{edge_id}: pin.ranks is empty, needed at least one module; remove the pin or name one")


def check_menu(shape: ModelShape, config: FederationConfig) -> tuple[int, ...]:
    """The ranks of the menu that the global adapter can hold and some module can carry.

    Raises PlanError when there are none.
    """
    cap = config.aggregation.rank_cap
    widest = max((min(m.out_features, m.in_features) for m in shape.modules.values()), default=0)
    ranks = tuple(rank for rank in config.planning.ranks if rank <= min(cap, widest))
    if not ranks:
        raise PlanError(
            f"planning.ranks {list(config.planning.ranks)} has no rank of at most {min(cap, widest)} "
            f"(aggregation.rank_cap is {cap}, the model's modules carry up to {widest}); add a smaller rank"
        )
    return ranks


def _number_faults(profile: EdgeProfile) -> Iterable[str]:
    step, activation = profile.step_cost, profile.activation_cost
    positive = {
        "num_examples": profile.num_examples,
        "tokens_per_example": profile.tokens_per_example,
        "memory_bytes": profile.memory_bytes,
        "bandwidth_bytes_per_second": profile.bandwidth_bytes_per_second,
        "step_cost.per_token_seconds": step.per_token_seconds,
    }
    not_negative = {
        "fixed_bytes": profile.fixed_bytes,
        "num_validation_examples": profile.num_validation_examples,
        "step_cost.fixed_seconds": step.fixed_seconds,
        "step_cost.per_token_feature_seconds": step.per_token_feature_seconds,
        "step_cost.per_token_rank_seconds": step.per_token_rank_seconds,
        **{f"step_cost.dequantization_seconds[{bits}]": v for bits, v in step.dequantization_seconds.items()},
        "activation_cost.fixed_bytes": activation.fixed_bytes,
        "activation_cost.per_token_bytes": activation.per_token_bytes,
        **{f"activation bytes of {module}": v for module, v in activation.per_token_module_bytes.items()},
        **{f"scores of {module}": v for module, scores in profile.scores.items() for v in scores},
    }
    yield from (f"{n} is {v}, needed above 0" for n, v in positive.items() if not (math.isfinite(v) and v > 0))
    yield from (f"{n} is {v}, needed 0 or more" for n, v in not_negative.items() if not (math.isfinite(v) and v >= 0))


def _module_faults(profile: EdgeProfile, shape: ModelShape) -> Iterable[str]:
    for what, modules in (
        ("scores", profile.scores),
        ("activation bytes", profile.activation_cost.per_token_module_bytes),
    ):
        unknown = sorted(set(modules) - set(shape.modules))
        if unknown:
            yield f"{what} name {len(unknown)} modules the base model does not have, such as {unknown[0]!r}"
