"""The uniform baseline: federated LoRA with one plan for all edges, as large as the weakest edge can carry.

FedIT (arXiv 2305.05644) and the systems after it take one rank and one batch size by hand; the largest that every edge
can hold is the fairest such choice. It becomes a pin on every edge, so pricing and checks stay the planner's.
"""

import math
from collections.abc import Mapping
from itertools import product

from fedpipe_core.config import FederationConfig, PlanPin
from fedpipe_core.costs import Work
from fedpipe_core.errors import PlanError
from fedpipe_core.planning_checks import check_menu
from fedpipe_core.planning_problem import cost_model
from fedpipe_core.schemas import EdgeProfile, ModelShape


def with_uniform_pins(
    shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig
) -> FederationConfig:
    """The config with the same pin on every edge: all attention projections at one rank, batch size and bit width.

    The widest base comes first, then the largest rank, then the largest batch. Every edge makes the steps that
    `training.examples_per_round` needs, whatever its speed.
    Raises PlanError for pins set by hand, and when no plan of the menu fits every edge.
    """
    by_hand = [edge.edge_id for edge in config.edges if edge.pin != PlanPin()]
    if by_hand:
        raise PlanError(f"method fedlora gives every edge the same plan, but {by_hand[0]} has a pin; remove the pin")
    modules = attention_projections(shape)
    bits, rank, batch_size = _largest_that_fits_all(shape, profiles, config, modules)
    edges = []
    for edge in config.edges:
        examples = config.training.examples_per_round or profiles[edge.edge_id].num_examples
        steps = math.ceil(examples / batch_size)
        ranks = dict.fromkeys(modules, rank)
        pin = PlanPin(ranks=ranks, batch_size=batch_size, local_steps=steps, base_bits=bits)
        edges.append(edge.model_copy(update={"pin": pin}))
    return config.model_copy(update={"edges": tuple(edges)})


def attention_projections(shape: ModelShape) -> list[str]:
    """Modules of an attention, which every architecture of transformers calls so; all modules where none is."""
    found = [name for name in shape.modules if "attn" in name.lower() or "attention" in name.lower()]
    return found or list(shape.modules)


def _largest_that_fits_all(
    shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig, modules: list[str]
) -> tuple[int, int, int]:
    ranks, batches = sorted(check_menu(shape, config), reverse=True), sorted(config.planning.batch_sizes, reverse=True)
    needed: dict[str, float] = {}
    for bits, rank, batch_size in product(sorted(config.model.bits, reverse=True), ranks, batches):
        work = Work(dict.fromkeys(modules, rank), batch_size, 1, bits)
        needed = {e: _peak_bytes(shape, profile, work, config) for e, profile in profiles.items()}
        if all(bytes_ <= profiles[e].memory_bytes for e, bytes_ in needed.items()):
            return bits, rank, batch_size
    weakest = max(needed, key=lambda edge_id: needed[edge_id] / profiles[edge_id].memory_bytes)
    raise PlanError(
        f"{weakest}: memory: the smallest uniform plan (rank {ranks[-1]} on {len(modules)} attention projections, "
        f"batch {batches[-1]}, {min(config.model.bits)}-bit base) needs {needed[weakest] / 2**30:.3g} GiB but it has "
        f"{profiles[weakest].memory_bytes / 2**30:.3g} GiB; leave the edge out, or use method fedpipe"
    )


def _peak_bytes(shape: ModelShape, profile: EdgeProfile, work: Work, config: FederationConfig) -> float:
    costs = cost_model(shape, profile, work.ranks, config)
    return costs.peak_memory_bytes(work, work.lowest_block(shape))
