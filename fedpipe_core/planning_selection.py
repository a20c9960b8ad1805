"""What every edge trains in rounds of one length: greedy plans, refined by the exact solver where it is asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedpipe_core.config_planning import PlanningSpec
from fedpipe_core.planning_greedy import Duals, Frontier, frontier, solve_greedily, sweep_cells
from fedpipe_core.planning_problem import EdgeProblem, RoundTerms
from fedpipe_core.planning_solver import Refinement, refine


@dataclass(frozen=True)
class PreparedEdge:
    """An edge's problem with what does not depend on the deadline."""

    problem: EdgeProblem
    duals: list[Duals]
    front: Frontier


def prepare(problem: EdgeProblem) -> PreparedEdge:
    """Sweep a problem once, for every deadline."""
    sweeps = sweep_cells(problem)
    return PreparedEdge(problem, [swept.duals for swept in sweeps], frontier(problem, sweeps))


def select(
    prepared: Mapping[str, PreparedEdge], terms: RoundTerms, solver: str, stop_at: float
) -> dict[str, Refinement]:
    """The best selection of every edge, each of which must have one; `milp` goes on until `time.monotonic()`."""
    greedy = {e: solve_greedily(edge.problem, edge.duals, edge.front, terms) for e, edge in prepared.items()}
    if solver == "greedy":
        return {e: Refinement(selection, math.inf) for e, selection in greedy.items()}
    return {e: refine(edge.problem, edge.duals, greedy[e], terms, stop_at) for e, edge in prepared.items()}


def how_found(found: Mapping[str, Refinement], planning: PlanningSpec) -> str:
    """In words how every edge's selection was found."""
    if planning.solver == "greedy":
        return "greedy"
    gap = max(refinement.gap for refinement in found.values())
    late = sorted(edge_id for edge_id, refinement in found.items() if refinement.timed_out)
    if not late:
        return f"milp, every edge within {gap:.2%} of the optimum"
    return (
        f"greedy on {len(late)} of {len(found)} edges (from {late[0]} on), where milp ran out of "
        f"planning.solver_seconds ({planning.solver_seconds:g}); every edge within {gap:.2%} of the optimum"
    )
