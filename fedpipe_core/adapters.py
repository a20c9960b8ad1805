"""The adapter as values: where it starts, and what part of it an edge trains.

Factors travel with alpha / rank already folded into B, so sums of products need no scaling. How factors become layers
of a model is `model`'s to decide, how updates are combined `aggregation`'s.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpipe_core.low_rank import LowRank, stacked
from fedpipe_core.profile_schemas import ModuleShape

# A component whose row of A is this much shorter than the longest passes no gradient to B: it is dead.
DEAD_ROW_SHARE = 1e-3


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes by module name, and the parameters trained in full (the task's head) by parameter name."""

    factors: Mapping[str, LowRank]
    head: Mapping[str, Tensor]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every adapted module."""
        return {module: factors.rank for module, factors in self.factors.items()}


def initial_adapter(shapes: Mapping[str, ModuleShape], rank: int, head: Mapping[str, Tensor], seed: int) -> Adapter:
    """The adapter of round 1: B = 0, so the model is the base; A uniform in ±1/√in_features as in LoRA (2106.09685).

    A depends on (seed, module) alone and is the same on every machine.
    """
    return Adapter(
        {module: _initial_factors(shape, rank, seed, module) for module, shape in shapes.items()}, dict(head)
    )


def _initial_factors(shape: ModuleShape, rank: int, seed: int, module: str) -> LowRank:
    B = torch.zeros(shape.out_features, rank, dtype=torch.float32)
    return LowRank(B, _random_rows(seed, module, rank, shape.in_features))


def split_for_edge(adapter: Adapter, ranks: Mapping[str, int], seed: int) -> tuple[Adapter, dict[str, LowRank]]:
    """What an edge trains, and the frozen tail beside it; together they are exactly the function of `adapter`.

    Of every module in `ranks` the edge trains the first components (`aggregation` leaves them in falling order of σ)
    and the head; the other components and all other modules form the tail, without which an edge of small rank would
    start from a different model than the rest. Components that do not exist or are dead are replaced by a fresh
    random A with B = 0, the same on every edge for one (seed, module). Tail entries that are zero are left out.
    """
    trained: dict[str, LowRank] = {}
    tail: dict[str, LowRank] = {}
    for module, factors in adapter.factors.items():
        rest = factors
        if module in ranks:
            trained[module], rest = _split(factors, ranks[module], seed, module)
        if bool(rest.B.any()):
            tail[module] = rest
    return Adapter(trained, adapter.head), tail


def truncated_for_edge(adapter: Adapter, ranks: Mapping[str, int], seed: int) -> tuple[Adapter, dict[str, LowRank]]:
    """`split_for_edge` as HETLoRA, FlexLoRA, raFLoRA and FedIT publish it: what an edge cannot train it does not see.

    The components of a trained module beyond the edge's rank are dropped, so edges start from different functions.
    """
    trained, tail = split_for_edge(adapter, ranks, seed)
    return trained, {module: factors for module, factors in tail.items() if module not in ranks}


def fresh_for_edge(adapter: Adapter, ranks: Mapping[str, int], seed: int) -> tuple[Adapter, dict[str, LowRank]]:
    """`split_for_edge` as FLoRA publishes it: all that was learned is frozen, and a new adapter starts at B = 0."""
    fresh = {
        module: LowRank(
            adapter.factors[module].B.new_zeros(adapter.factors[module].shape[0], rank),
            _random_rows(seed, module, rank, adapter.factors[module].shape[1]),
        )
        for module, rank in ranks.items()
    }
    return Adapter(fresh, adapter.head), {m: factors for m, factors in adapter.factors.items() if bool(factors.B.any())}


def _split(factors: LowRank, rank: int, seed: int, module: str) -> tuple[LowRank, LowRank]:
    lengths = factors.A.norm(dim=1)
    live = (lengths > DEAD_ROW_SHARE * lengths.max()) if factors.rank else lengths > 0
    chosen = live & (torch.arange(factors.rank) < rank)
    leading = factors if rank >= factors.rank else factors.leading(rank)
    if bool(chosen[:rank].all()) and rank <= factors.rank:
        return leading, LowRank(factors.B[:, rank:], factors.A[rank:])
    out_features, in_features = factors.shape
    B = factors.B.new_zeros(out_features, rank)
    A = _random_rows(seed, module, rank, in_features).to(factors.A.dtype)
    positions = chosen.nonzero()[:, 0]
    B[:, positions], A[positions] = factors.B[:, positions], factors.A[positions]
    return LowRank(B, A), factors.select(~chosen)


def _random_rows(seed: int, module: str, rows: int, in_features: int) -> Tensor:
    """Rows of A uniform in ±1/√in_features; row j is the same however many rows are drawn."""
    digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    uniform = torch.stack([torch.rand(in_features, generator=generator, dtype=torch.float32) for _ in range(rows)])
    return (2 * uniform - 1).div(math.sqrt(in_features))


def joined(trained: Adapter, tail: Mapping[str, LowRank]) -> Adapter:
    """The adapter whose function is that of `trained` with its frozen tail beside it."""
    modules = [*trained.factors, *(module for module in tail if module not in trained.factors)]
    parts = {module: [p[module] for p in (trained.factors, tail) if module in p] for module in modules}
    return Adapter({module: stacked(terms) for module, terms in parts.items()}, trained.head)
