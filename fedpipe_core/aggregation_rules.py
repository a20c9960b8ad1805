"""Aggregation rules: each says what one module of the global adapter becomes, given what the edges made of it.

A rule takes the module's previous global factors and the edges' contributions, whose weights sum to 1. It returns
factors that stand as they are (`LowRank`), or a sum still to be truncated (`RunningSum`). A new rule is one function,
one entry in `RULES`, one name in `config.AggregationRule` and one test. Server step, momentum and truncation are
`aggregation`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpipe_core.adapters import Adapter
from fedpipe_core.low_rank import LowRank, RunningSum


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one edge made of one module, and its weight in the average.

    The factors are looked up at each use, so a mapping that reads them from disk never holds more than one module.
    """

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

    Inexact: B·A ≠ Σ w_k·B_k·A_k, because of the cross terms B_i·A_j.
    """
    rank = max(contribution.trained.rank for contribution in contributions)
    B, A = _zeros(previous, rank)
    for contribution in contributions:
        trained = contribution.trained
        B[:, : trained.rank] += contribution.weight * trained.B
        A[: trained.rank] += contribution.weight * trained.A
    return LowRank(B.to(previous.B.dtype), A.to(previous.A.dtype))


def _zeros(previous: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    out_features, in_features = previous.shape
    return torch.zeros(out_features, rank, dtype=torch.float64), torch.zeros(rank, in_features, dtype=torch.float64)


RULES: dict[str, Rule] = {"delta_svd": delta_svd, "fedavg": fedavg}
