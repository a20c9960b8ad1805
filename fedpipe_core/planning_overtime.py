"""Work for edges that would wait: more than their planned examples, and the weights to go with it, until the last ends.

What an edge learns meanwhile costs no round any time; a deadline is chosen as if there were none. Weights are chosen
once more. While an edge waits, a gradient that reaches deep blocks is free; now it takes steps from what the edge can
do. And what few edges train is worth less: with it an edge fits its own rows in weights that the others do not adapt.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedpipe_core.config_planning import PlanningSpec
from fedpipe_core.planning_greedy import ROUNDING, Selection, slacks
from fedpipe_core.planning_problem import Cell, EdgeProblem, RoundTerms
from fedpipe_core.planning_selection import PreparedEdge, prepare, select
from fedpipe_core.planning_solver import Refinement
from fedpipe_core.planning_utility import FloatArray

PASSES = 3  # at most: what an edge should train depends on what the others do; after two passes little changes


def with_overtime(
    prepared: Mapping[str, PreparedEdge],
    found: Mapping[str, Refinement],
    penalty: float,
    planning: PlanningSpec,
    stop_at: float,
) -> dict[str, Refinement]:
    """Edges that would wait for the slowest do up to `planning.overtime` times what is planned; the others stay.

    They learn from no fewer examples than before. The penalty is that of all examples of the longer round, so one of
    them counts for less than a planned one. A module counts by the share of all examples that lies at edges training
    it. Steps that are pinned stay.
    """
    found = dict(found)
    waiting = sorted(edge_id for edge_id, refinement in found.items() if _would_wait(refinement.selection))
    if planning.overtime == 1 or not waiting:
        return found
    problems = {edge_id: edge.problem for edge_id, edge in prepared.items()}
    end = max(-slacks(problems[e], refinement.selection, 0.0)[1] for e, refinement in found.items())
    longer = {e: _longer_problem(problems[e], found[e].selection, planning.overtime) for e in waiting}
    before: dict[str, FloatArray] = {}
    for _ in range(PASSES):
        shares = _coverage(problems, found, waiting)
        if before and all(np.array_equal(before[e], shares[e]) for e in waiting):
            break  # every edge would choose the same once more
        before = shares
        discounted = {e: prepare(_discounted(longer[e], shares[e])) for e in waiting}
        found |= select(discounted, RoundTerms(end, penalty), planning.solver, stop_at)
    return found


def _would_wait(selection: Selection) -> bool:
    cell = selection.cell
    return selection.steps == cell.planned_steps > cell.least_steps


def _coverage(
    problems: Mapping[str, EdgeProblem], found: Mapping[str, Refinement], waiting: Sequence[str]
) -> dict[str, FloatArray]:
    """Per waiting edge and module the share of all examples at edges that train it, the edge itself among them."""
    examples = {e: problem.costs.profile.num_examples for e, problem in problems.items()}
    trained = {e: problem.ranks_of(found[e].selection.choice.tolist()) for e, problem in problems.items()}
    held = Counter[str]()
    for edge_id, ranks in trained.items():
        held.update(dict.fromkeys(ranks, examples[edge_id]))
    total = sum(examples.values())
    return {
        e: np.array([held[m] + (0 if m in trained[e] else examples[e]) for m in problems[e].modules]) / total
        for e in waiting
    }


def _discounted(problem: EdgeProblem, share: FloatArray) -> EdgeProblem:
    utility = problem.utility
    return replace(problem, utility=np.where(utility >= 0, utility * share[:, None], utility))


def _longer_problem(problem: EdgeProblem, selection: Selection, times: float) -> EdgeProblem:
    """Up to `times` the planned steps in every cell, and no fewer than teach what the selection does."""
    taught = selection.steps * selection.cell.share_per_step
    cells = (_longer(cell, taught, times) for cell in problem.cells)
    return replace(problem, cells=tuple(cell for cell in cells if cell.least_steps <= cell.planned_steps))


def _longer(cell: Cell, taught: float, times: float) -> Cell:
    return replace(
        cell,
        planned_steps=int(times * cell.planned_steps),
        least_steps=math.ceil(taught / cell.share_per_step * (1 - ROUNDING)),
        share_per_step=cell.share_per_step / times,
    )
