"""How large the global adapter gets under a plan: what edges download, and carry as a frozen tail."""

from collections.abc import Mapping

from fedpipe_core.config import FederationConfig
from fedpipe_core.profile_schemas import ModelShape

# Rules that average component by component: the global adapter never gets a larger rank than an edge trains.
RANK_KEEPING_RULES = ("fedavg", "hetlora", "rankwise", "ffa")


def keeps_ranks(config: FederationConfig) -> bool:
    """Whether the configured rule never makes a rank larger than the largest an edge trains."""
    return config.aggregation.rule in RANK_KEEPING_RULES


def reached_global_ranks(
    shape: ModelShape, ranks: Mapping[str, Mapping[str, int]], config: FederationConfig
) -> dict[str, int]:
    """Rank of each adapted module at the end: it starts at the largest planned, and each round can add every edge's."""
    start = max((rank for edge in ranks.values() for rank in edge.values()), default=0)
    summed = {name: sum(edge.get(name, 0) for edge in ranks.values()) for name in shape.modules}
    grown = 0 if keeps_ranks(config) else config.rounds
    return {n: capped_rank(shape, n, max(start, rank * grown), config) for n, rank in summed.items() if rank}


def capped_rank(shape: ModelShape, module: str, rank: int, config: FederationConfig) -> int:
    """A rank cut to what the config and the module's shape allow."""
    return min(rank, config.aggregation.rank_cap, shape.modules[module].out_features, shape.modules[module].in_features)
