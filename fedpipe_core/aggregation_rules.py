"""Aggregation rules: each says what one module of the global adapter becomes, given what the edges made of it.

A rule takes the module's previous global factors and the edges' contributions, whose weights sum to 1. It returns
factors that stand as they are (`LowRank`), or a sum still to be truncated (`RunningSum`). A new rule is one function,
one entry in `RULES`, one name in `config.AggregationRule` and one test. Server step, momentum and truncation are
`aggregation`'s.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpipe_core.adapters import Adapter, fresh_for_edge, split_for_edge, truncated_for_edge
from fedpipe_core.errors import UpdateRefusedError
from fedpipe_core.low_rank import LowRank, RunningSum


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one edge made of one module, and its weight in the average.

    The factors are looked up at each use, so a mapping that reads them from disk never holds more than one module.
    """

    edge_id: str
    module: str
    weight: float
    start_adapter: Adapter
    trained_adapter: Adapter

    @property
    def start(self) -> LowRank:
        """The factors this edge started from."""
        return self.start_adapter.factors[self.module]

    @property
    def trained(self) -> LowRank:
        """The factors this edge returned."""
        return self.trained_adapter.factors[self.module]


Rule = Callable[[LowRank, Sequence[Contribution]], LowRank | RunningSum]
EdgeStart = Callable[[Adapter, Mapping[str, int], int], tuple[Adapter, dict[str, LowRank]]]


def delta_svd(previous: LowRank, contributions: Sequence[Contribution]) -> LowRank | RunningSum:
    """The exact weighted sum of changes: Δ ← Δ + Σ_k w_k·(B_k·A_k − B⁰_k·A⁰_k); unchanged when no edge changed.

    Ranks r_k may differ: B_k is (out, r_k), A_k (r_k, in). An edge starts from components of Δ itself, so its −B⁰A⁰
    only lowers the weight those components keep, which saves r_k columns and a subtraction of near-equal numbers.
    """
    kept = torch.ones(previous.rank, dtype=torch.float64)
    total, changed = RunningSum(), False
    for contribution in contributions:
        start, trained, weight = contribution.start, contribution.trained, contribution.weight
        if trained.equals(start):
            continue
        changed = True
        if trained.rank > start.rank and trained.leading(start.rank).equals(start):  # start plus directions of change
            total.add(LowRank(trained.B[:, start.rank :], trained.A[start.rank :]), weight)
            continue
        total.add(trained, weight)
        held = _components_held(previous, start)
        if held is None:
            total.add(start, -weight)
        else:
            kept[: len(held)] -= weight * held
    if not changed:
        return previous
    remaining = kept.abs() > 1e-12
    if bool(remaining.any()):
        total.add(previous.select(remaining).scaled(kept[remaining].to(previous.B.dtype)))
    return total


def _components_held(previous: LowRank, start: LowRank) -> Tensor | None:
    """Mask over the leading components of `previous` that `start` holds; None when `start` holds anything else."""
    common = min(previous.rank, start.rank)
    same = (start.B[:, :common] == previous.B[:, :common]).all(0) & (start.A[:common] == previous.A[:common]).all(1)
    silent = ~start.B.any(0)
    if not bool((same | silent[:common]).all() and silent[common:].all()):
        return None
    return same & ~silent[:common]


def fedavg(previous: LowRank, contributions: Sequence[Contribution]) -> LowRank:
    """Factors averaged separately (FedIT, 2305.05644): B = Σ w_k·B_k, A = Σ w_k·A_k, missing ranks read as zero.

    Inexact: B·A ≠ Σ w_k·B_k·A_k, because of the cross terms B_i·A_j; and low ranks dilute the higher components.
    """
    del previous
    return _mean_of_factors(contributions, [contribution.weight for contribution in contributions])


def hetlora(previous: LowRank, contributions: Sequence[Contribution]) -> LowRank:
    """`fedavg` weighted by the norm of each edge's product (HETLoRA, 2401.06432): w_k = ‖B_k·A_k‖ / Σ ‖B_l·A_l‖.

    Missing ranks read as zero, examples do not count, and HETLoRA's pruning of ranks at the edge is left out.
    When all products are zero the examples decide.
    """
    del previous
    norms = [contribution.trained.norm() for contribution in contributions]
    if not sum(norms):
        norms = [contribution.weight for contribution in contributions]
    return _mean_of_factors(contributions, [norm / sum(norms) for norm in norms])


def rankwise(previous: LowRank, contributions: Sequence[Contribution]) -> LowRank:
    """Component j averaged over the edges that have it (RBLA, 2408.08699), in both factors.

    B[:, j] = Σ_{r_k > j} w_k·B_k[:, j] / Σ_{r_k > j} w_k, and A[j] alike. Components beyond every edge's rank stay.
    Inexact as `fedavg` is, but low ranks dilute nothing.
    """
    mean = _mean_of_factors(contributions, [contribution.weight for contribution in contributions])
    held = _weight_holding(contributions)
    B, A = mean.B / held.to(mean.B.dtype), mean.A / held.to(mean.A.dtype)[:, None]
    return LowRank(torch.cat([B, previous.B[:, mean.rank :]], dim=1), torch.cat([A, previous.A[mean.rank :]], dim=0))


def ffa(previous: LowRank, contributions: Sequence[Contribution]) -> LowRank:
    """B alone is averaged, component by component; A is shared and frozen (FFA-LoRA, 2403.12313), so B·A is exact.

    B[:, j] = Σ_{r_k > j} w_k·B_k[:, j] / Σ_{r_k > j} w_k. Edges of lower rank hold the leading rows of A.

    Raises UpdateRefusedError when an edge changed A, or has a rank the shared A does not.
    """
    for contribution in contributions:
        rank = contribution.trained.rank
        if rank > previous.rank or not torch.equal(contribution.trained.A, previous.A[:rank]):
            raise UpdateRefusedError(
                f"{contribution.edge_id}: returned {contribution.module} at rank {rank} with an A that is not the "
                f"leading rows of the shared A of rank {previous.rank}; rule ffa needs A frozen at every edge"
            )
    return LowRank(rankwise(previous, contributions).B, previous.A)


def flexlora(previous: LowRank, contributions: Sequence[Contribution]) -> RunningSum:
    """The mean of the products (FlexLoRA, 2402.11505): T = Σ w_k·B_k·A_k, truncated by SVD.

    Exact for what edges hold, but an edge that holds only the leading components votes zero for all others.
    """
    del previous
    total = RunningSum()
    for contribution in contributions:
        total.add(contribution.trained, contribution.weight)
    return total


def raflora(previous: LowRank, contributions: Sequence[Contribution]) -> RunningSum:
    """`flexlora` with each band of components averaged over the edges that reach it (raFLoRA, 2602.13486).

    T = Σ_j Σ_{r_k > j} w_k / W_j · B_k[:, j]·A_k[j] with W_j = Σ_{r_k > j} w_k: components between two neighbouring
    ranks have the same holders and form one band.
    """
    held, total = _weight_holding(contributions), RunningSum()
    for contribution in contributions:
        trained = contribution.trained
        total.add(trained.scaled((contribution.weight / held[: trained.rank]).to(previous.B.dtype)))
    return total


def flora_stack(previous: LowRank, contributions: Sequence[Contribution]) -> LowRank:
    """Changes stacked and never truncated (FLoRA, 2409.05976): B = [B_0 | w_1·B_1 | …], A = [A_0 ; A_1 ; …].

    FLoRA folds the stack into the base after each round; a quantized base cannot take it, so here the stack is kept
    beside the base. Its rank grows with every round up to min(out, in), where it is compressed without loss.
    """
    target = delta_svd(previous, contributions)
    return target if isinstance(target, LowRank) else target.exact()


def _mean_of_factors(contributions: Sequence[Contribution], weights: Sequence[float]) -> LowRank:
    first = contributions[0].trained
    rank = max(contribution.trained.rank for contribution in contributions)
    B = torch.zeros(first.shape[0], rank, dtype=torch.float64)
    A = torch.zeros(rank, first.shape[1], dtype=torch.float64)
    for contribution, weight in zip(contributions, weights, strict=True):
        trained = contribution.trained
        B[:, : trained.rank] += weight * trained.B.double()
        A[: trained.rank] += weight * trained.A.double()
    return LowRank(B.to(first.B.dtype), A.to(first.A.dtype))


def _weight_holding(contributions: Sequence[Contribution]) -> Tensor:
    """Per component the total weight of the edges that have it."""
    ranks = [contribution.trained.rank for contribution in contributions]
    held = torch.zeros(max(ranks), dtype=torch.float64)
    for contribution, rank in zip(contributions, ranks, strict=True):
        held[:rank] += contribution.weight
    return held


RULES: dict[str, Rule] = {
    "delta_svd": delta_svd,
    "fedavg": fedavg,
    "hetlora": hetlora,
    "rankwise": rankwise,
    "ffa": ffa,
    "flexlora": flexlora,
    "raflora": raflora,
    "flora_stack": flora_stack,
}

# How edges start under each rule, as it was published; rules not named here start with the frozen tail.
EDGE_STARTS: dict[str, EdgeStart] = {
    "fedavg": truncated_for_edge,
    "hetlora": truncated_for_edge,
    "rankwise": truncated_for_edge,
    "ffa": truncated_for_edge,
    "flexlora": truncated_for_edge,
    "raflora": truncated_for_edge,
    "flora_stack": fresh_for_edge,
}


def edge_start(rule: str) -> EdgeStart:
    """The function that splits the global adapter for an edge under this rule."""
    return EDGE_STARTS.get(rule, split_for_edge)


def has_frozen_tail(rule: str) -> bool:
    """Whether an edge carries what it does not train of the global adapter as a frozen adapter under this rule."""
    return edge_start(rule) is not truncated_for_edge
