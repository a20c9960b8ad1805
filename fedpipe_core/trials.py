"""FedAdapter's side trials (arXiv 2205.10162): edges try neighbouring sizes of the bottlenecks, the best one stays.

In a trial's round some edges train the size the federation has (`same`), others one a step deeper or wider; what is
added starts as the identity. Each judges its validation rows before and after its training. The candidate whose edges
gained most per time wins, and its size is what the global adapter keeps: components that several candidates have are
averaged over all edges that trained them. The size is read off the global adapter, and who tries what follows from
seed and round, so a trial leaves nothing behind but the round's plan and records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedpipe_core.adapters import Adapter
from fedpipe_core.config import FedAdapterSpec, FederationConfig
from fedpipe_core.costs import Work
from fedpipe_core.methods import Ranks, bottleneck_size, bottlenecks, method_shape
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan, PredictedCost, TrialRole
from fedpipe_core.planning_problem import cost_model
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape
from fedpipe_core.schemas import UpdateRecord
from fedpipe_core.seeding import random_generator

SAME = "same"


def candidates(shape: ModelShape, ranks: Mapping[str, int], spec: FedAdapterSpec) -> dict[str, Ranks]:
    """The present size and its neighbours, by name. `shape` is the method's, `ranks` what the global adapter has."""
    depth, width = bottleneck_size(shape, ranks)
    found = {SAME: bottlenecks(shape, depth, width)}
    if depth < shape.num_blocks:
        found["deeper"] = bottlenecks(shape, min(depth + spec.depth_step, shape.num_blocks), width)
    if width < spec.largest_width:
        found["wider"] = bottlenecks(shape, depth, min(width + spec.width_step, spec.largest_width))
    return found


def plan_trial(
    plan: FederationPlan,
    global_ranks: Mapping[str, int],
    round_index: int,
    base_shape: ModelShape,
    profiles: Mapping[str, EdgeProfile],
    config: FederationConfig,
) -> FederationPlan:
    """The plan of a round: every edge's candidate, priced. A candidate that any edge cannot hold is not tried.

    Edges are dealt to the candidates by seed and round, as evenly as they go; with fewer edges than candidates the
    larger ones take turns. Outside trials every edge trains the size there is.
    """
    shape = method_shape(base_shape, config)
    offered = candidates(shape, global_ranks, config.fedadapter)
    priced = {
        name: {e: _price(plan.edges[e], ranks, global_ranks, shape, profiles[e], config) for e in plan.edges}
        for name, ranks in offered.items()
    }
    fitting = [n for n in offered if all(c.peak_memory_bytes <= profiles[e].memory_bytes for e, c in priced[n].items())]
    trial = not round_index % config.fedadapter.trial_rounds
    larger = [name for name in fitting if name != SAME]
    names = _dealt(sorted(plan.edges), larger if trial else [], round_index, config.seed)
    edges = {}
    for edge_id, name in names.items():
        cost, usual = priced[name][edge_id], priced[SAME][edge_id]
        role = TrialRole(candidate=name, relative_seconds=cost.round_seconds / usual.round_seconds)
        trying = {"trial": role if trial and larger else None, "ranks": offered[name], "predicted": cost}
        edges[edge_id] = plan.edges[edge_id].model_copy(update=trying)
    slowest = max(edge.predicted.round_seconds for edge in edges.values())
    limit = config.planning.round_seconds
    return plan.model_copy(update={"edges": edges, "round_seconds": limit or slowest})


def foreseen_rounds(
    plan: FederationPlan,
    base_shape: ModelShape,
    profiles: Mapping[str, EdgeProfile],
    config: FederationConfig,
) -> list[tuple[FederationPlan, int]]:
    """The plans of a whole run, each with how many rounds it holds for, if every trial's largest candidate wins.

    Nobody can know who wins; few ways that a run can take are dearer.
    """
    ranks = dict.fromkeys(method_shape(base_shape, config).modules, 0)
    ranks |= {name: rank for edge in plan.edges.values() for name, rank in edge.ranks.items()}
    found = [(plan, 1)]
    for index in range(2, config.rounds + 1):
        plan = plan_trial(plan, ranks, index, base_shape, profiles, config)
        tried = [edge.ranks for edge in plan.edges.values() if edge.trial]
        if not tried and not index % config.fedadapter.trial_rounds:  # nothing larger is left, or fits
            return [*found, (plan, config.rounds - index + 1)]
        found.append((plan, 1))
        if tried:
            largest = max(tried, key=lambda candidate: sum(candidate.values()))
            ranks |= largest
    return found


def _price(
    edge: EdgePlan,
    ranks: Ranks,
    global_ranks: Mapping[str, int],
    shape: ModelShape,
    profile: EdgeProfile,
    config: FederationConfig,
) -> PredictedCost:
    """What a round of a size costs an edge; its validation rows are judged twice."""
    costs = replace(cost_model(shape, profile, dict(global_ranks), config), validations=2)
    return costs.predict(Work(ranks, edge.batch_size, edge.local_steps, edge.base_bits))


def _dealt(edges: Sequence[str], larger: Sequence[str], round_index: int, seed: int) -> dict[str, str]:
    """A candidate for every edge; one edge alone can compare nothing."""
    turn = round_index % len(larger) if larger else 0
    tried = [SAME, *larger[turn:], *larger[:turn]][: len(edges)] if len(edges) > 1 else [SAME]
    order = random_generator("trial", seed, round_index).permutation(len(edges))
    return {edges[position]: tried[place % len(tried)] for place, position in enumerate(order.tolist())}


def winner(plan: FederationPlan, updates: Mapping[str, UpdateRecord]) -> str | None:
    """The candidate with the largest gain per time; None where nothing was tried, the smaller size where it is equal.

    An edge's gain is the share of its validation loss that its training took away, over its round's predicted seconds
    in units of what `same` takes it; a candidate's is the mean of its edges', weighted by examples.
    """
    gains: dict[str, list[tuple[int, float]]] = {}
    for edge_id, update in updates.items():
        role = plan.edges[edge_id].trial
        before, after = update.metrics.get("loss"), update.trained_metrics.get("loss")
        if role is not None and before and after is not None:
            gain = (before - after) / before / role.relative_seconds
            gains.setdefault(role.candidate, []).append((update.num_examples, gain))
    if not gains:
        return SAME if any(edge.trial for edge in plan.edges.values()) else None
    means = {name: sum(n * gain for n, gain in found) / sum(n for n, _ in found) for name, found in gains.items()}
    return max(means, key=lambda name: (means[name], name == SAME, name))


def settled(
    adapter: Adapter, previous: Mapping[str, int], plan: FederationPlan, updates: Mapping[str, UpdateRecord]
) -> Adapter:
    """The aggregate cut to the size that won; as it is where nothing was tried. `previous` are the ranks before."""
    name = winner(plan, updates)
    if name is None:
        return adapter
    tried = [edge.ranks for edge in plan.edges.values() if edge.trial and edge.trial.candidate == name]
    kept = tried[0] if tried else previous
    factors = {m: f.leading(kept.get(m, 0)) for m, f in adapter.factors.items()}
    return Adapter(factors, adapter.head)
