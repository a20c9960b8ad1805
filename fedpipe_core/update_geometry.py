"""Norms, angles and distances of updates, on products B·A and never on their factors, whose basis is arbitrary.

From these follow the edges' weights under a robust center. Which update is refused is `update_checks`' to decide.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fedpipe_core.adapters import Adapter
from fedpipe_core.config import AggregationSpec
from fedpipe_core.low_rank import LowRank, RunningSum, change, stacked

WEISZFELD_STEPS = 8
SMOOTHING = 0.1  # share of the median distance below which nearness to the center adds no more weight


@dataclass(frozen=True, eq=False)
class Update:
    """What one edge returned: the factors it started from and what it made of them (`split_for_edge`'s first part)."""

    edge_id: str
    start: Adapter
    trained: Adapter
    num_examples: int

    def change(self, module: str) -> LowRank:
        """What the edge changed in one module."""
        return change(self.start.factors[module], self.trained.factors[module])

    def first_order_change(self, module: str) -> LowRank:
        """What a small step along the edge's way changes: (B − B⁰)·A⁰ + B⁰·(A − A⁰).

        It turns round exactly when an edge reverses its factors' changes; of the whole change (B − B⁰)·(A − A⁰) stays.
        """
        start, trained = self.start.factors[module], self.trained.factors[module]
        if start.rank != trained.rank:  # the start with directions of change behind it: linear already
            return self.change(module)
        return stacked([LowRank(trained.B - start.B, start.A), LowRank(start.B, trained.A - start.A)])

    def head_norm(self) -> float:
        """Norm of what the edge changed in the head."""
        pairs = [(self.trained.head[name], self.start.head[name]) for name in self.start.head]
        return math.sqrt(sum(float((trained.double() - start.double()).square().sum()) for trained, start in pairs))


ChangeOf = Callable[[Update, str], LowRank]


@dataclass(frozen=True)
class Alignment:
    """Per edge and module, with D_k an edge's change times its scale and S = Σ D_l: ⟨D_k, S⟩ and ‖D_k‖²."""

    with_sum: dict[str, dict[str, float]]
    with_itself: dict[str, dict[str, float]]

    def sum_squared(self, module: str) -> float:
        """‖S‖² of one module."""
        return max(sum(values.get(module, 0.0) for values in self.with_sum.values()), 0.0)


def change_norms(update: Update, change_of: ChangeOf = Update.change) -> dict[str, float]:
    """Norm of the change of every module the edge trained."""
    return {module: change_of(update, module).norm() for module in update.trained.factors}


def align(updates: Sequence[Update], scales: Mapping[str, float], change_of: ChangeOf = Update.change) -> Alignment:
    """How each scaled change lies to their sum, one module at a time in O((out + in)·R) per edge, R the summed rank."""
    with_sum: dict[str, dict[str, float]] = {update.edge_id: {} for update in updates}
    with_itself: dict[str, dict[str, float]] = {update.edge_id: {} for update in updates}
    for module in sorted({module for update in updates for module in update.trained.factors}):
        holders = [update for update in updates if module in update.trained.factors]
        total = RunningSum()
        for update in holders:
            total.add(change_of(update, module), scales[update.edge_id])
        for update in holders:
            changed, scale = change_of(update, module), scales[update.edge_id]
            with_sum[update.edge_id][module] = scale * total.inner(changed)
            with_itself[update.edge_id][module] = (scale * changed.norm()) ** 2
    return Alignment(with_sum, with_itself)


def cosines_with_the_rest(updates: Sequence[Update]) -> dict[str, float]:
    """Cosine between each edge's first-order change and the sum of the others', each scaled to norm 1 so none rules.

    Only the modules an edge trained are compared; 0 where nothing is comparable.
    """
    first = Update.first_order_change
    norms = {update.edge_id: math.hypot(*change_norms(update, first).values()) for update in updates}
    alignment = align(updates, {edge: 1.0 / norm if norm else 0.0 for edge, norm in norms.items()}, first)
    cosines = {}
    for edge, with_sum in alignment.with_sum.items():
        own = alignment.with_itself[edge]
        with_rest = sum(with_sum.values()) - sum(own.values())
        rest = sum(alignment.sum_squared(module) - 2 * with_sum[module] + own[module] for module in with_sum)
        scale = math.sqrt(sum(own.values()) * max(rest, 0.0))
        cosines[edge] = with_rest / scale if scale > 1e-12 else 0.0
    return cosines


def center_weights(updates: Sequence[Update], spec: AggregationSpec) -> dict[str, float]:
    """Weight of each edge under `spec.center`: its examples, or these lowered by the distance from the median.

    `geometric_median` is the smoothed Weiszfeld iteration of RFA (1912.13445) on the products' changes:
    w_k ← n_k / max(ν, d_k) with d_k the root mean square over the edge's modules of ‖D_k − M‖, M = Σ w_l·D_l / Σ w_l,
    and ν a tenth of the median distance, so that one edge of many examples does not become the median alone.
    `trimmed_mean` then leaves out the `trim_share` of edges with the largest d_k and weighs the others by examples.
    """
    examples = {update.edge_id: float(update.num_examples) for update in updates}
    if spec.center == "mean" or len(updates) < 3:
        return examples
    weights, distances = dict(examples), {}
    for _ in range(WEISZFELD_STEPS):
        distances = _distances(updates, weights)
        floor = SMOOTHING * median(distances.values()) or 1.0
        weights = {edge: examples[edge] / max(distance, floor) for edge, distance in distances.items()}
    if spec.center == "geometric_median":
        return weights
    ascending = sorted(distances, key=lambda edge: (distances[edge], edge))
    trimmed = set(ascending[len(ascending) - int(spec.trim_share * len(ascending)) :])
    return {edge: 0.0 if edge in trimmed else count for edge, count in examples.items()}


def _distances(updates: Sequence[Update], weights: Mapping[str, float]) -> dict[str, float]:
    """Root mean square, over the modules it shares, of an edge's distance ‖D_k − M‖ from the holders' weighted mean.

    An edge that shares no module is given the median distance of the others.
    """
    alignment = align(updates, weights)
    holders: dict[str, list[str]] = {}
    for edge, values in alignment.with_sum.items():
        for module in values:
            holders.setdefault(module, []).append(edge)
    distances: dict[str, float] = {}
    for edge, with_sum in alignment.with_sum.items():
        squares = []
        for module in (module for module in with_sum if len(holders[module]) > 1):
            own, held = weights[edge], sum(weights[holder] for holder in holders[module])
            itself, mean = alignment.with_itself[edge][module] / own**2, alignment.sum_squared(module) / held**2
            squares.append(itself - 2 * with_sum[module] / (own * held) + mean)
        if squares:
            distances[edge] = math.sqrt(max(sum(squares), 0.0) / len(squares))
    typical = median(distances.values()) if distances else 1.0
    return {update.edge_id: distances.get(update.edge_id, typical) for update in updates}
