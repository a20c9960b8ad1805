"""One global adapter out of the edges' updates: weights, the configured rule, server step and momentum, truncation.

The rules themselves are in `aggregation_rules`; which updates may count at all is `update_checks`' to decide.
Modules are aggregated one after another, so memory is bounded by one module's factors, however many edges there are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedpipe_core.adapters import Adapter
from fedpipe_core.aggregation_rules import RULES, Contribution
from fedpipe_core.config import AggregationSpec
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.low_rank import LowRank, RunningSum
from fedpipe_core.update_geometry import Update, center_weights

__all__ = ["RULES", "Aggregate", "Update", "aggregate"]


@dataclass(frozen=True, eq=False)
class Aggregate:
    """The next global adapter, per module the Frobenius norm of what was cut, and per edge the weight it had."""

    adapter: Adapter
    truncation_error: dict[str, float]
    weights: dict[str, float]


def aggregate(
    previous: Adapter, updates: Sequence[Update], spec: AggregationSpec, before_previous: Adapter | None = None
) -> Aggregate:
    """Combine the updates into the next global adapter; their order changes no byte.

    With the rule's target T of a module, Δ ← Δ + server_step·(T − Δ) + server_momentum·(Δ − Δ_before), truncated to
    `energy` and `rank_cap`. A module nobody trained stays as it is. The head is the mean weighted by examples.
    Momentum needs `before_previous`, the global adapter one round earlier, and is zero without it.

    Raises UpdateRefusedError when an edge answers twice or trained a module the global adapter does not have.
    """
    ordered = sorted(updates, key=lambda update: update.edge_id)
    _check_edges(previous, ordered)
    weights = center_weights(ordered, spec)
    factors: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    for module, old in previous.factors.items():
        contributions = _contributions(module, previous, ordered, weights, spec.weighting)
        before = before_previous.factors.get(module) if before_previous else None
        factors[module], errors[module] = _next_factors(old, before, contributions, spec)
    return Aggregate(Adapter(factors, _mean_head(previous, ordered, weights)), errors, weights)


def _check_edges(previous: Adapter, ordered: Sequence[Update]) -> None:
    for earlier, later in pairwise(ordered):
        if earlier.edge_id == later.edge_id:
            raise UpdateRefusedError(f"{later.edge_id}: has two updates in one round, needed one; drop either")
    for update in ordered:
        unknown = sorted(set(update.trained.factors) - set(previous.factors))
        if unknown:
            raise UpdateRefusedError(
                f"{update.edge_id}: trained {unknown[0]}, which the global adapter does not have; "
                "start the round from this run's global adapter"
            )


def _contributions(
    module: str, previous: Adapter, ordered: Sequence[Update], weights: Mapping[str, float], weighting: str
) -> list[Contribution]:
    """Contributions with weights that sum to 1; under `all`, edges that did not train the module count as unchanged."""
    holders = [u for u in ordered if module in u.trained.factors and weights[u.edge_id]]
    held = sum(weights[update.edge_id] for update in holders)
    if not holders:
        return []
    total = sum(weights.values()) if weighting == "all" else held
    contributions = [Contribution(u.edge_id, module, weights[u.edge_id] / total, u.start, u.trained) for u in holders]
    if len(holders) < len(ordered) and weighting == "all":
        contributions.append(Contribution("others", module, 1.0 - held / total, previous, previous))
    return contributions


def _next_factors(
    old: LowRank, before: LowRank | None, contributions: Sequence[Contribution], spec: AggregationSpec
) -> tuple[LowRank, float]:
    if not contributions:
        return old, 0.0
    target = RULES[spec.rule](old, contributions)
    momentum = spec.server_momentum if before is not None else 0.0
    if spec.server_step != 1.0 or momentum:
        target = _server_step(old, before, target, spec)
    if isinstance(target, LowRank):
        return target, 0.0
    return target.truncate(spec.energy, spec.rank_cap)


def _server_step(
    old: LowRank, before: LowRank | None, target: LowRank | RunningSum, spec: AggregationSpec
) -> RunningSum:
    total = RunningSum()
    total.add_sum(target, spec.server_step)
    momentum = spec.server_momentum if before is not None else 0.0
    total.add(old, 1.0 - spec.server_step + momentum)
    if before is not None and momentum:
        total.add(before, -momentum)
    return total


def _mean_head(previous: Adapter, ordered: Sequence[Update], weights: Mapping[str, float]) -> dict[str, Tensor]:
    total = sum(weights.values())
    if not total:
        return dict(previous.head)
    shares = [weights[update.edge_id] / total for update in ordered]
    return {name: _weighted_mean([u.trained.head[name] for u in ordered], shares) for name in previous.head}


def _weighted_mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, share in zip(values, shares, strict=True):
        total += value.double() * share
    return total.to(values[0].dtype)
