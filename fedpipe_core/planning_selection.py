"""What every edge trains in rounds of one length: greedy plans, refined by the exact solver where it is asked for."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedpipe_core.config_planning import PlanningSpec
from fedpipe_core.planning_greedy import Duals, Frontier, Selection, frontier, solve_greedily, sweep_cells
from fedpipe_core.planning_problem import EdgeProblem, RoundTerms
from fedpipe_core.planning_solver import refine


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
    prepared: Mapping[str, PreparedEdge], terms: RoundTerms, planning: PlanningSpec
) -> tuple[dict[str, Selection], str]:
    """The best selection of every edge, each of which must have one, and in words how it was found."""
    greedy = {e: solve_greedily(edge.problem, edge.duals, edge.front, terms) for e, edge in prepared.items()}
    if planning.solver == "greedy":
        return greedy, "greedy"
    stop_at = time.monotonic() + planning.solver_seconds
    refined = {e: refine(edge.problem, edge.duals, greedy[e], terms, stop_at) for e, edge in prepared.items()}
    gap = max(refinement.gap for refinement in refined.values())
    late = [edge_id for edge_id, refinement in refined.items() if refinement.timed_out]
    solver = f"milp, every edge within {gap:.2%} of the optimum"
    if late:
        solver = (
            f"greedy on {len(late)} of {len(refined)} edges (from {late[0]} on), where milp ran out of "
            f"planning.solver_seconds ({planning.solver_seconds:g}); every edge within {gap:.2%} of the optimum"
        )
    return {edge_id: refinement.selection for edge_id, refinement in refined.items()}, solver
