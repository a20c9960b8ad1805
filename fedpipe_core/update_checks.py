"""Which updates count: each is checked against its plan, then all of them against each other.

Both tests between edges work on the products' changes (`update_geometry`). The caller records what is refused and why.
"""

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fedpipe_core.adapters import Adapter
from fedpipe_core.config import AggregationSpec
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.low_rank import LowRank, inner, stacked
from fedpipe_core.update_geometry import Update, change_norms, cosines_with_the_rest

# An update is reversed when the others agree at all, and it opposes them nearly as much as they agree.
LEAST_AGREEMENT = 0.05
OPPOSITION_SHARE = 0.75
LEAST_OPPOSITION = 0.15
FEWEST_FOR_DIRECTION = 4
FEWEST_FOR_MAJORITY = 3


def check_update(update: Update, plan_ranks: Mapping[str, int]) -> None:
    """Refuse an update that is not what its plan asked for, before anything is computed with it.

    Raises UpdateRefusedError naming the edge, the module or head parameter, and what was found and needed: modules,
    ranks, shapes, a floating dtype, finite numbers, at least one example.
    """
    edge, trained, start = update.edge_id, update.trained, update.start
    if update.num_examples < 1:
        raise UpdateRefusedError(f"{edge}: counts {update.num_examples} examples, needed at least 1; check its data")
    _check_names(edge, "module", set(trained.factors), set(plan_ranks))
    _check_names(edge, "head parameter", set(trained.head), set(start.head))
    for module, rank in plan_ranks.items():
        _check_rank(edge, module, trained.factors[module], rank, start.factors[module])
        out_features, in_features = start.factors[module].shape
        held = trained.factors[module].B.shape[1]
        _check_tensor(f"{edge}: B of {module}", trained.factors[module].B, (out_features, held))
        _check_tensor(f"{edge}: A of {module}", trained.factors[module].A, (held, in_features))
    for name, value in start.head.items():
        _check_tensor(f"{edge}: head parameter {name}", trained.head[name], tuple(value.shape))


def _check_names(edge: str, kind: str, found: set[str], needed: set[str]) -> None:
    for name in sorted(needed - found):
        raise UpdateRefusedError(f"{edge}: lacks {kind} {name}, which its plan trains; train with this run's plan")
    for name in sorted(found - needed):
        raise UpdateRefusedError(f"{edge}: holds {kind} {name}, which its plan does not train; use this run's plan")


def _check_rank(edge: str, module: str, trained: LowRank, rank: int, start: LowRank) -> None:
    """The planned rank, or the start's own components with at most twice as many directions of change behind them."""
    if trained.B.ndim == 2 and trained.B.shape[1] == rank:
        return
    extended = trained.B.ndim == trained.A.ndim == 2 and rank < trained.B.shape[1] <= 3 * rank
    if not (extended and trained.leading(rank).equals(start)):
        raise UpdateRefusedError(
            f"{edge}: B of {module} has shape {tuple(trained.B.shape)}, needed rank {rank}; train with this run's plan"
        )


def _check_tensor(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise UpdateRefusedError(f"{what} has shape {tuple(value.shape)}, needed {shape}; train with this run's plan")
    if not value.is_floating_point():
        raise UpdateRefusedError(f"{what} has dtype {value.dtype}, needed a floating dtype; encode it with `wire`")
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise UpdateRefusedError(
            f"{what} has {bad} of {value.numel()} entries not finite, needed none; lower training.learning_rate"
        )


class Screening(NamedTuple):
    """Updates that count, the reason of each refused edge, and the edges that must agree before they count again.

    `suspects` are the updates refused for their direction alone, which a better judge may let count.
    """

    counted: list[Update]
    refused: dict[str, str]
    opposed: tuple[str, ...]
    suspects: tuple[Update, ...] = ()

    def pardon(self, suspect: Update) -> "Screening":
        """The same with a suspect counted."""
        return Screening(
            sorted([*self.counted, suspect], key=lambda update: update.edge_id),
            {edge_id: reason for edge_id, reason in self.refused.items() if edge_id != suspect.edge_id},
            tuple(edge_id for edge_id in self.opposed if edge_id != suspect.edge_id),
            tuple(other for other in self.suspects if other is not suspect),
        )


def screen_updates(updates: Sequence[Update], spec: AggregationSpec, opposed: Collection[str] = ()) -> Screening:
    """Test finite updates against each other; `opposed` is what the round before returned under that name.

    Magnitude: over the modules an edge trained, ‖D_k‖ against the norms that are the median of the other edges' per
    module; the head likewise. Above `outlier_factor` times that (its square while fewer than three edges can form a
    majority) the policy decides: `reject` refuses, `clip` scales the change down to the usual norm, `accept` takes it.

    Direction, unless the policy is `accept` and with four edges or more: refused is an edge whose way has a cosine
    with the sum of the others' below −0.15 and below −3/4 of the median of what the others have, if that median
    exceeds 0.05. Edges that merely differ, or that all oppose each other because their labels do, keep it low and
    stay. The head is left out: with labels of their own, honest edges push its rows apart. An edge once refused for
    its direction counts again when its cosine is above the same limits with a positive sign, since a reversed edge
    stands out less as honest ones part ways.
    """
    ordered = sorted(updates, key=lambda update: update.edge_id)
    if spec.outliers == "accept":
        return Screening(ordered, {}, ())
    usual, refused = _screen_magnitude(ordered, spec)
    reversed_now = _still_opposed(usual, opposed)
    agreed = {update.edge_id for update in usual} - set(reversed_now)
    counted = [update for update in usual if update.edge_id not in reversed_now]
    while reversed_edge := _most_reversed(counted):
        edge, reason = reversed_edge
        reversed_now[edge] = reason
        counted = [update for update in counted if update.edge_id != edge]
    still_opposed = tuple(sorted({*opposed} - agreed | set(reversed_now)))
    suspects = tuple(update for update in usual if update.edge_id in reversed_now)
    return Screening(counted, refused | reversed_now, still_opposed, suspects)


def _screen_magnitude(ordered: Sequence[Update], spec: AggregationSpec) -> tuple[list[Update], dict[str, str]]:
    norms = {update.edge_id: change_norms(update) for update in ordered}
    heads = {update.edge_id: {"head": update.head_norm()} for update in ordered}
    factor = spec.outlier_factor if len(ordered) >= FEWEST_FOR_MAJORITY else spec.outlier_factor**2
    all_norms, all_heads = _ascending(norms), _ascending(heads)
    counted, refused = [], {}
    for update in ordered:
        own, head = norms[update.edge_id], heads[update.edge_id]
        usual = _usual_norm(own, all_norms), _usual_norm(head, all_heads)
        found = math.hypot(*own.values()), head["head"]
        excess = [(f, factor * u) for f, u in zip(found, usual, strict=True) if u > 0 and not f <= factor * u]
        if excess and spec.outliers == "reject":
            refused[update.edge_id] = (
                f"{update.edge_id}: changed by a norm of {excess[0][0]:.3g}, needed at most {excess[0][1]:.3g}, "
                f"{factor:g} times what is usual for the other edges; check its data, or set aggregation.outliers"
            )
        else:
            counted.append(_clipped(update, usual) if excess else update)
    return counted, refused


def _ascending(norms: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Per module the norms of all edges that trained it, in rising order."""
    found: dict[str, list[float]] = {}
    for values in norms.values():
        for module, norm in values.items():
            found.setdefault(module, []).append(norm)
    return {module: sorted(values) for module, values in found.items()}


def median_without(ascending: Sequence[float], value: float) -> float | None:
    """Median of rising values without one of them, in O(log n); None when no other is left."""
    left, position = len(ascending) - 1, bisect.bisect_left(ascending, value)
    if not left:
        return None
    low, high = (index + (index >= position) for index in ((left - 1) // 2, left // 2))
    return (ascending[low] + ascending[high]) / 2


def _usual_norm(own_norms: Mapping[str, float], ascending: Mapping[str, Sequence[float]]) -> float:
    """Norm of an update that has, in every module of one edge, the median norm of the other edges that trained it.

    A module nobody else trained counts with the edge's own norm; 0 when the others changed nothing.
    """
    usual, comparable = [], 0.0
    for module, own in own_norms.items():
        others = median_without(ascending[module], own)
        typical = own if others is None else others
        comparable += 0.0 if others is None else typical
        usual.append(typical)
    return math.hypot(*usual) if comparable else 0.0


def _clipped(update: Update, limits: tuple[float, float]) -> Update:
    """The update with each part of its change scaled down to its limit, if any; ranks and shapes stay."""
    adapters_limit, head_limit = limits
    share = _share_within(update, adapters_limit) if adapters_limit else 1.0
    factors = {
        module: _interpolated(update.start.factors[module], trained, share)
        for module, trained in update.trained.factors.items()
    }
    head_share = min(1.0, head_limit / update.head_norm()) if head_limit and update.head_norm() else 1.0
    head = {n: start + head_share * (update.trained.head[n] - start) for n, start in update.start.head.items()}
    return replace(update, trained=Adapter(factors, head))


def _aligned_start(start: LowRank, trained: LowRank) -> LowRank:
    """The start with as many components as the trained factors, those behind it silent."""
    extra = trained.rank - start.rank
    return stacked([start, LowRank(start.B.new_zeros(start.shape[0], extra), trained.A[start.rank :])])


def _interpolated(start: LowRank, trained: LowRank, share: float) -> LowRank:
    begin = _aligned_start(start, trained)
    return LowRank(begin.B + share * (trained.B - begin.B), begin.A + share * (trained.A - begin.A))


def _share_within(update: Update, limit: float) -> float:
    """The s in (0, 1] for which moving both factors by s of their way changes the products by at most `limit`.

    The change is s·P + s²·Q with P = ΔB·A⁰ + B⁰·ΔA and Q = ΔB·ΔA, so its squared norm is a polynomial in s.
    """
    first, mixed, second = 0.0, 0.0, 0.0
    for module, trained in update.trained.factors.items():
        begin = _aligned_start(update.start.factors[module], trained)
        step_B, step_A = trained.B - begin.B, trained.A - begin.A
        linear, quadratic = stacked([LowRank(step_B, begin.A), LowRank(begin.B, step_A)]), LowRank(step_B, step_A)
        first, mixed = first + inner(linear, linear), mixed + inner(linear, quadratic)
        second += inner(quadratic, quadratic)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        squared = middle**2 * first + 2 * middle**3 * mixed + middle**4 * second
        low, high = (middle, high) if squared <= limit**2 else (low, middle)
    return high if high == 1.0 else low


def _still_opposed(updates: Sequence[Update], opposed: Collection[str]) -> dict[str, str]:
    """Reasons of the edges that opposed the others before and do not agree with them yet."""
    others = [update for update in updates if update.edge_id not in opposed]
    reasons = {}
    for edge in (update for update in updates if update.edge_id in opposed):
        cosines = cosines_with_the_rest([*others, edge])
        found = cosines.pop(edge.edge_id)
        needed = max(OPPOSITION_SHARE * median(cosines.values()), LEAST_OPPOSITION) if cosines else LEAST_OPPOSITION
        if found < needed:
            reasons[edge.edge_id] = (
                f"{edge.edge_id}: its change opposed the other edges' before, and has a cosine of {found:.2f} with "
                f"them now, needed {needed:.2f}; check its labels and its loss, or set aggregation.outliers to accept"
            )
    return reasons


def _most_reversed(updates: Sequence[Update]) -> tuple[str, str] | None:
    if len(updates) < FEWEST_FOR_DIRECTION:
        return None
    cosines = cosines_with_the_rest(updates)
    edge = min(cosines, key=lambda edge: (cosines[edge], edge))
    agreement = median(cosine for other, cosine in cosines.items() if other != edge)
    limit = -max(OPPOSITION_SHARE * agreement, LEAST_OPPOSITION)
    if agreement <= LEAST_AGREEMENT or cosines[edge] >= limit:
        return None
    return edge, (
        f"{edge}: its change opposes the other edges' with cosine {cosines[edge]:.2f} while theirs agree with "
        f"{agreement:.2f}; check its labels and its loss, or set aggregation.outliers to accept"
    )
