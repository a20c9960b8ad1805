"""The planner: which weights each edge adapts, at what rank, with what batch, steps, bits and checkpointing.

Given every edge's profile it maximises, per edge, (Σ utility(module, rank) − price·(share of parameters trained))^¼ −
loss of the base's bits − penalty·u, where u = max(0, 1 − processed/planned) is the under-training rate, with examples
in large batches counting for less (gradient noise scale), subject to the edge's memory and to one round deadline shared
by all edges. The parts: `planning_utility` says what a rank is worth, `costs` what it costs, `planning_deadline` how
long a round lasts, `planning_selection` finds each edge's selection by `planning_greedy` and `planning_solver`,
`planning_overtime` gives edges that would wait more to do, `planning_checks` says what is refused.
The same profiles and config give the same plan, byte for byte.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedpipe_core.config import FederationConfig, PlanPin
from fedpipe_core.costs import Work
from fedpipe_core.errors import UnfitEdgesError
from fedpipe_core.global_ranks import capped_rank, keeps_ranks, reached_global_ranks
from fedpipe_core.methods import METHODS
from fedpipe_core.plan_schemas import EdgePlan, FederationPlan
from fedpipe_core.planning_binding import binding_limit
from fedpipe_core.planning_checks import check_menu, check_pin, check_profile
from fedpipe_core.planning_deadline import choose_deadline, shortest_round
from fedpipe_core.planning_greedy import Selection
from fedpipe_core.planning_infeasible import explain_memory, explain_seconds
from fedpipe_core.planning_overtime import with_overtime
from fedpipe_core.planning_problem import EdgeProblem, RoundTerms, adaptable_modules, build_problem, cost_model
from fedpipe_core.planning_selection import PreparedEdge, how_found, prepare, select
from fedpipe_core.planning_solver import Refinement
from fedpipe_core.planning_uniform import plan_uniformly, unfit_edges
from fedpipe_core.planning_utility import edge_utilities, net_of_price
from fedpipe_core.profile_schemas import EdgeProfile, ModelShape

__all__ = ["check_profile", "infeasible_edges", "plan_federation", "prepare_edges", "round_terms"]


def plan_federation(shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig) -> FederationPlan:
    """Plan every edge by the configured method.

    Raises PlanError for a profile or pin that cannot be, and UnfitEdgesError for edges without any plan: it names each
    of them, the limit that binds, and the cheapest change that would make it feasible. Under `planning.unfit_edges:
    drop` the plan is made for the others, while there are any.
    """
    try:
        planner = plan_uniformly if METHODS[config.method].sizes else _plan_by_importance
        return planner(shape, profiles, config)
    except UnfitEdgesError as unfit:
        fitting = {edge_id: profile for edge_id, profile in profiles.items() if edge_id not in unfit.reasons}
        if config.planning.unfit_edges == "refuse" or not fitting:
            raise
        plan = plan_federation(shape, fitting, config)
        return plan.model_copy(update={"dropped": unfit.reasons | plan.dropped})


def _plan_by_importance(
    shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig
) -> FederationPlan:
    prepared = prepare_edges(shape, profiles, config)
    infeasible = _infeasible(prepared, config)
    if infeasible:
        raise UnfitEdgesError(infeasible)
    terms = round_terms(prepared, config)
    stop_at = time.monotonic() + config.planning.solver_seconds
    found = select(prepared, terms, config.planning.solver, stop_at)
    found = with_overtime(prepared, found, terms.penalty, config.planning, stop_at)
    return _federation_plan(prepared, found, terms.seconds, config)


def infeasible_edges(
    shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig
) -> dict[str, str]:
    """Edges without any plan, each with the limit that binds and the cheapest change that would make it feasible.

    Raises PlanError for a profile or pin that cannot be.
    """
    if METHODS[config.method].sizes:
        return unfit_edges(shape, profiles, config)
    return _infeasible(prepare_edges(shape, profiles, config), config)


def prepare_edges(
    shape: ModelShape, profiles: Mapping[str, EdgeProfile], config: FederationConfig
) -> dict[str, PreparedEdge]:
    """Check profiles and pins, and lay out every edge's problem. Raises PlanError for what cannot be."""
    pins = {edge.edge_id: edge.pin for edge in config.edges}
    ranks = check_menu(shape, config)
    for edge_id, profile in profiles.items():
        check_profile(profile, shape)
        check_pin(edge_id, pins.get(edge_id, PlanPin()), shape, config)
    modules = adaptable_modules(shape, ranks)
    features = np.array([shape.modules[name].features for name in modules])
    price = config.planning.parameter_price
    global_ranks = _largest_global_ranks(shape, profiles, pins, config)
    prepared = {}
    for edge_id, utility in sorted(edge_utilities(profiles, modules, ranks).items()):
        costs = cost_model(shape, profiles[edge_id], global_ranks, config)
        worth = dict(zip(modules, net_of_price(utility, features, ranks, price), strict=True))
        problem = build_problem(costs, config, pins.get(edge_id, PlanPin()), worth, ranks)
        prepared[edge_id] = prepare(problem)
    return prepared


def _largest_global_ranks(
    shape: ModelShape, profiles: Mapping[str, EdgeProfile], pins: Mapping[str, PlanPin], config: FederationConfig
) -> dict[str, int]:
    """The largest rank each module can have at the end, whatever is planned: every edge's largest rank, every round."""
    pinned = [rank for pin in pins.values() for rank in (pin.ranks or {}).values()]
    free = [] if all(pins.get(edge_id, PlanPin()).ranks for edge_id in profiles) else config.planning.ranks
    largest = max([*free, *pinned]) * _rank_growth(config, len(profiles))
    return {name: capped_rank(shape, name, largest, config) for name in shape.modules}


def _rank_growth(config: FederationConfig, edges: int) -> int:
    """How often an edge's rank can go into the global adapter's."""
    return 1 if keeps_ranks(config) else edges * config.rounds


def _infeasible(prepared: Mapping[str, PreparedEdge], config: FederationConfig) -> dict[str, str]:
    reasons = {}
    limit = config.planning.round_seconds
    pins = {edge.edge_id: edge.pin for edge in config.edges}
    for edge_id, edge in prepared.items():
        if not len(edge.front.value):
            reasons[edge_id] = explain_memory(edge.problem, config, pins.get(edge_id, PlanPin()))
        elif limit is not None and shortest_round(edge.front) > limit:
            reasons[edge_id] = explain_seconds(edge_id, shortest_round(edge.front), limit)
    return reasons


def round_terms(prepared: Mapping[str, PreparedEdge], config: FederationConfig) -> RoundTerms:
    """The configured deadline, or the one chosen for edges that all have a plan."""
    penalty = config.planning.under_training_penalty
    fronts = {edge_id: edge.front for edge_id, edge in prepared.items()}
    examples = {edge_id: edge.problem.costs.profile.num_examples for edge_id, edge in prepared.items()}
    return RoundTerms(config.planning.round_seconds or choose_deadline(fronts, examples, penalty), penalty)


def _federation_plan(
    prepared: Mapping[str, PreparedEdge], found: Mapping[str, Refinement], seconds: float, config: FederationConfig
) -> FederationPlan:
    """Price the selections with the global adapter they lead to; a chosen deadline ends with the slowest edge."""
    selections = {edge_id: refinement.selection for edge_id, refinement in found.items()}
    ranks = {e: edge.problem.ranks_of(selections[e].choice.tolist()) for e, edge in prepared.items()}
    global_ranks = reached_global_ranks(next(iter(prepared.values())).problem.costs.shape, ranks, config)
    edges = {
        e: _edge_plan(edge.problem, selections[e], ranks[e], global_ranks, seconds) for e, edge in prepared.items()
    }
    slowest = max(plan.predicted.round_seconds for plan in edges.values())
    solver = how_found(found, config.planning)
    return FederationPlan(round_seconds=config.planning.round_seconds or slowest, solver=solver, edges=edges)


def _edge_plan(
    problem: EdgeProblem, selection: Selection, ranks: dict[str, int], global_ranks: dict[str, int], seconds: float
) -> EdgePlan:
    cell = selection.cell
    work = Work(ranks, cell.batch_size, selection.steps, cell.base_bits, cell.checkpointing)
    under_training = max(0.0, 1.0 - selection.steps * cell.batch_size / problem.planned_examples)
    return EdgePlan(
        edge_id=problem.costs.profile.edge_id,
        ranks=ranks,
        batch_size=cell.batch_size,
        local_steps=selection.steps,
        base_bits=cell.base_bits,
        checkpointing=cell.checkpointing,
        predicted=replace(problem.costs, global_ranks=global_ranks).predict(work),
        binding=binding_limit(problem, selection, seconds),
        under_training=under_training,
    )
