"""Exact refinement of one edge's greedy plan: bounds prune what cannot win, a MILP settles the best few.

A sub-problem fixes cell, lowest block and local steps; what remains is a multiple-choice knapsack with two budgets.
Weak duality on the greedy's sweep bounds all sub-problems at once; those whose bound exceeds the best plan found are
solved by `scipy.optimize.milp` (HiGHS), most promising first.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpipe_core.planning_greedy import Duals, Selection, preferred, price, step_seconds, value_of
from fedpipe_core.planning_problem import Cell, EdgeProblem, IntArray, RoundTerms
from fedpipe_core.planning_utility import FloatArray

TOLERANCE = 0.002  # of a plan's worth; a sub-problem that can gain less is not solved
MIP_OPTIONS = {"mip_rel_gap": 5e-4, "node_limit": 500}  # HiGHS stops there: the same place on any machine
SOLVED = 4  # sub-problems solved per edge at most
# Shares of all items' seconds at which the tightest multipliers are looked up; the last stands for no deadline.
PROBES = np.array([*(np.linspace(0, 1, 24) ** 2), 1e6])


@dataclass(frozen=True)
class SubProblem:
    """What one MILP is about: a cell, the lowest block as an index into `blocks`, and the local steps."""

    cell: Cell
    block: int
    steps: int


@dataclass(frozen=True)
class Refinement:
    """The plan, how far below the optimum it can be as a share of its worth, and how it was found."""

    selection: Selection
    gap: float
    solved: int = 0
    timed_out: bool = False


def refine(
    problem: EdgeProblem, duals: Sequence[Duals], greedy: Selection, terms: RoundTerms, stop_at: float
) -> Refinement:
    """Improve a greedy plan until nothing can gain more than the tolerance or `SOLVED` sub-problems are solved.

    When `time.monotonic()` passes `stop_at` the greedy plan is kept whatever was found: it is the same on any machine,
    what a solver holds when it is stopped is not.
    """
    candidates = bound_sub_problems(problem, duals, terms, greedy.value)
    found, proven = [greedy], [greedy.value]
    for sub_problem, bound in candidates[:SOLVED]:
        best = max(found, key=lambda selection: selection.value)
        if bound <= best.value + TOLERANCE * best.worth:
            break
        try:
            selection, proven_bound = solve(problem, sub_problem, terms, stop_at)
        except TimeoutError:
            return Refinement(greedy, _gap(candidates[0][1], greedy), timed_out=True)
        found.extend(selection)
        proven.append(min(bound, proven_bound))
    solved = len(proven) - 1
    best = preferred(found)
    return Refinement(
        best, _gap(max([*proven, *(bound for _, bound in candidates[solved : solved + 1])]), best), solved
    )


def bound_sub_problems(
    problem: EdgeProblem, duals: Sequence[Duals], terms: RoundTerms, least_value: float = -np.inf
) -> list[tuple[SubProblem, float]]:
    """The most promising sub-problems with an upper bound on the value of each, highest bound first.

    Cells that cannot exceed `least_value` are left out.

    For any μ, λ ≥ 0: utility ≤ Σ max(0, U − μ·bytes − λ·seconds) + μ·(memory left) + λ·(seconds left per step).
    The list holds one more than can be solved, whose bound then covers all that are not in it.
    """
    ranked = []
    for cell, cell_duals in zip(problem.cells, duals, strict=True):
        if _optimistic(problem, cell, terms) <= least_value:
            continue
        table = _bounds(problem, cell, cell_duals, terms)
        for flat in np.argsort(-table, axis=None, kind="stable")[: SOLVED + 1]:
            block, steps = np.unravel_index(flat, table.shape)
            sub_problem = SubProblem(cell, int(block), int(steps) + cell.least_steps)
            ranked.append((sub_problem, float(table[block, steps])))
    return sorted((r for r in ranked if np.isfinite(r[1])), key=lambda r: -r[1])[: SOLVED + 1]


def solve(
    problem: EdgeProblem, sub_problem: SubProblem, terms: RoundTerms, stop_at: float
) -> tuple[list[Selection], float]:
    """The optimum of one sub-problem (none if it has no solution) and the upper bound HiGHS proved on its value.

    Raises TimeoutError when HiGHS had to stop.
    """
    remaining = stop_at - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    budgets = _budgets(problem, sub_problem, terms)
    if budgets.min() <= 0:
        return [], -np.inf
    module, column = _open_items(problem, sub_problem)
    result = _milp(problem, sub_problem, budgets, (module, column), remaining)
    if time.monotonic() >= stop_at:
        raise TimeoutError
    if result.x is None:
        return [], -np.inf if result.status == 2 else np.inf
    choice = np.full(len(problem.modules), -1)
    taken = np.flatnonzero(result.x > 0.5)
    choice[module[taken]] = column[taken]
    start = Selection(sub_problem.cell, sub_problem.block, sub_problem.steps, choice)
    bound = value_of(sub_problem.cell, problem.pinned_utility - result.mip_dual_bound, sub_problem.steps, terms)
    return [price(problem, start, terms)], float(bound)


def _budgets(problem: EdgeProblem, sub_problem: SubProblem, terms: RoundTerms) -> FloatArray:
    """Bytes, and seconds of the round, left for adapters."""
    cell, block = sub_problem.cell, sub_problem.block
    seconds = terms.seconds - cell.idle_seconds - sub_problem.steps * cell.block_seconds[block]
    return np.array([problem.memory_bytes - cell.block_memory[block], seconds])


def _milp(
    problem: EdgeProblem, sub_problem: SubProblem, budgets: FloatArray, items: tuple[IntArray, IntArray], seconds: float
) -> Any:
    """Maximise Σ utility over 0/1 items: one rank per module at most, one module at least, within both budgets."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    cell, module = sub_problem.cell, items[0]
    spent = (cell.item_memory[items], (sub_problem.steps * cell.item_seconds + cell.item_upload_seconds)[items])
    ranks_of_module = csr_array((np.ones(len(module)), (module, np.arange(len(module)))))
    count = ranks_of_module.shape[0]
    matrix = vstack([csr_array(np.stack(spent) / budgets[:, None]), ranks_of_module, np.ones((1, len(module)))])
    constraints = LinearConstraint(matrix, [-np.inf] * (2 + count) + [1.0], [1.0] * (2 + count) + [np.inf])
    return milp(
        -problem.utility[items],
        integrality=np.ones(len(module)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": seconds, **MIP_OPTIONS},
    )


def _open_items(problem: EdgeProblem, sub_problem: SubProblem) -> tuple[IntArray, IntArray]:
    reached = np.arange(len(problem.modules)) < problem.modules_reached[sub_problem.block]
    module, column = np.nonzero((problem.utility >= 0) & reached[:, None])
    return module, column


def _optimistic(problem: EdgeProblem, cell: Cell, terms: RoundTerms) -> float:
    """Value of a cell if every module had its largest rank at no cost."""
    steps = min(cell.planned_steps, (terms.seconds - cell.idle_seconds) / float(cell.block_seconds.min()))
    largest = problem.utility.max(axis=1, initial=0.0).sum()
    return float(value_of(cell, problem.pinned_utility + largest, steps, terms))


def _bounds(problem: EdgeProblem, cell: Cell, duals: Duals, terms: RoundTerms) -> FloatArray:
    """Upper bounds of shape (blocks, steps from `least_steps` on); −inf where the budgets hold nothing."""
    memory = problem.memory_bytes - cell.block_memory
    steps = np.arange(cell.least_steps, cell.planned_steps + 1, dtype=np.float64)
    seconds = (terms.seconds - cell.idle_seconds) / steps - cell.block_seconds[:, None]
    seconds /= _upload_factor(cell, steps)
    at_no_seconds = duals.reduced_utility + duals.multipliers[:, :1] * memory
    slopes = duals.multipliers[:, 1:]
    bound = np.full(seconds.shape, np.inf)
    for left in step_seconds(cell).max(axis=1, initial=0.0).sum() * PROBES:
        tightest = (at_no_seconds + slopes * left).argmin(axis=0)
        tangent = at_no_seconds[tightest, np.arange(len(memory))][:, None] + slopes[tightest] * seconds
        bound = np.minimum(bound, tangent)
    fits = (memory[:, None] >= 0) & (seconds >= 0)
    return np.where(fits, value_of(cell, problem.pinned_utility + bound, steps, terms), -np.inf)


def _upload_factor(cell: Cell, steps: FloatArray) -> FloatArray:
    """How much more, at least, an item takes per step when its upload is shared by fewer than the planned steps."""
    ratio = (cell.item_upload_seconds / np.maximum(cell.item_seconds, 1e-15)).min(initial=np.inf)
    ratio = 0.0 if np.isinf(ratio) else ratio
    return np.asarray((1 + ratio / steps) / (1 + ratio / cell.planned_steps))


def _gap(bound: float, selection: Selection) -> float:
    return max(0.0, bound - selection.value) / max(selection.worth, 1e-12)
