"""The uniform baselines: one plan for all edges, as large as the weakest edge can carry.

FedIT (arXiv 2305.05644) and the systems after it take one size and one batch by hand; the largest that every edge can
hold is the fairest such choice. What comes in which sizes is `methods`', what it costs `costs`'.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from fedpipe_core.config import Bits, FederationConfig, PlanPin
from fedpipe_core.costs import Work
from fedpipe_core.errors import PlanError, UnfitEdgesError
from fedpipe_core.global_ranks import reached_global_ranks
from fedpipe_core.methods import METHODS, Ranks, method_shape
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan, PredictedCost
from fedpipe_core.planning_checks import check_profile
from fedpipe_core.planning_infeasible import explain_seconds
from fedpipe_core.planning_problem import cost_model
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape

GIB = 2**30


@dataclass(frozen=True)
class Size:
    """What every edge would get alike."""

    base_bits: Bits
    ranks: Ranks
    batch_size: int

    def words(self, what: str) -> str:
        """The size as a person reads it."""
        rank = f"rank {max(self.ranks.values())} on {len(self.ranks)} {what}" if self.ranks else what
        return f"{rank}, batch {self.batch_size}, {self.base_bits}-bit base"


def plan_uniformly(shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig) -> FederationPlan:
    """The same ranks, batch size and bit width for every edge, and the steps its own examples need, however slow it is.

    The widest base comes first, then the largest ranks, then the largest batch.
    Raises PlanError for pins set by hand, UnfitEdgesError for edges that hold no uniform plan, or miss the deadline.
    """
    unfit = unfit_edges(shape, profiles, config)
    if unfit:
        raise UnfitEdgesError(unfit)
    sizes = _sizes(shape, config)
    chosen = next(index for index, size in enumerate(sizes) if not _over_memory(size, shape, profiles, config))
    tight = _over_memory(sizes[chosen - 1], shape, profiles, config) if chosen else {}
    edges = {
        edge_id: uniform_edge_plan(profile, sizes[chosen], shape, config, "memory" if edge_id in tight else "menu")
        for edge_id, profile in sorted(profiles.items())
    }
    _check_deadline(edges, config)
    slowest = max(plan.predicted.round_seconds for plan in edges.values())
    limit = config.planning.round_seconds
    return FederationPlan(round_seconds=limit or slowest, solver="uniform, by the weakest edge", edges=edges)


def unfit_edges(shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig) -> dict[str, str]:
    """Edges that do not hold the smallest uniform plan, with what it needs. Raises PlanError for pins set by hand."""
    by_hand = [edge.edge_id for edge in config.edges if edge.pin != PlanPin()]
    if by_hand:
        raise PlanError(
            f"method {config.method} gives every edge the same plan, but {by_hand[0]} has a pin; remove the pin"
        )
    for profile in profiles.values():
        check_profile(profile, shape)
    smallest, what = _sizes(shape, config)[-1], METHODS[config.method].what
    return {
        edge_id: f"{edge_id}: memory: the smallest uniform plan ({smallest.words(what)}) needs {needed / GIB:.3g} GiB "
        f"but it has {profiles[edge_id].memory_bytes / GIB:.3g} GiB; leave the edge out, set "
        "planning.unfit_edges to drop, or use method fedpipe"
        for edge_id, needed in _over_memory(smallest, shape, profiles, config).items()
    }


def uniform_edge_plan(
    profile: EdgeProfile, size: Size, shape: ModelShape, config: FederationConfig, binding: str
) -> EdgePlan:
    """One edge's plan of a uniform size."""
    examples = config.training.examples_per_round or profile.num_examples
    steps = math.ceil(examples / size.batch_size)
    return EdgePlan(
        edge_id=profile.edge_id,
        ranks=size.ranks,
        batch_size=size.batch_size,
        local_steps=steps,
        base_bits=size.base_bits,
        predicted=_predict(size, steps, shape, profile, config),
        binding=binding,
    )


def _sizes(shape: ModelShape, config: FederationConfig) -> list[Size]:
    """What may be planned, the largest first. Raises PlanError where the config allows no base the method can train."""
    traits = METHODS[config.method]
    bits = sorted(set(config.model.bits).intersection(traits.bits), reverse=True)
    if not bits:
        needed = " or ".join(map(str, traits.bits))
        raise PlanError(
            f"method {config.method} trains {traits.what} on a base of {needed} bits, but model.bits is "
            f"{list(config.model.bits)}; add one"
        )
    ranks = traits.sizes(method_shape(shape, config), config) if traits.sizes else ()
    batches = sorted(config.planning.batch_sizes, reverse=True)
    return [Size(*found) for found in product(bits, ranks, batches)]


def _over_memory(
    size: Size, shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig
) -> dict[str, int]:
    """Peak bytes on every edge that does not hold a size."""
    needed = {e: _predict(size, 1, shape, profile, config).peak_memory_bytes for e, profile in profiles.items()}
    return {edge_id: peak for edge_id, peak in needed.items() if peak > profiles[edge_id].memory_bytes}


def _predict(
    size: Size, steps: int, shape: ModelShape, profile: EdgeProfile, config: FederationConfig
) -> PredictedCost:
    trained = method_shape(shape, config)
    ranks = dict.fromkeys((edge.edge_id for edge in config.edges), size.ranks)
    costs = cost_model(trained, profile, reached_global_ranks(trained, ranks, config), config)
    return costs.predict(Work(size.ranks, size.batch_size, steps, size.base_bits))


def _check_deadline(edges: Mapping[str, EdgePlan], config: FederationConfig) -> None:
    limit = config.planning.round_seconds
    late: Iterable[EdgePlan] = () if limit is None else edges.values()
    reasons = {
        plan.edge_id: explain_seconds(plan.edge_id, plan.predicted.round_seconds, limit)
        for plan in late
        if limit is not None and plan.predicted.round_seconds > limit
    }
    if reasons:
        raise UnfitEdgesError(reasons)
