"""Fast plans for one edge: Lagrangian sweeps over all cells, then a fill of what is left of both budgets.

For multipliers (μ, λ) on memory and seconds every module takes the rank with the largest utility − μ·bytes − λ·seconds.
A sweep over many pairs gives near-optimal selections for every budget at once, so it is made once per edge and then
answers for any deadline; `planning_solver` reads upper bounds from the same numbers (weak duality).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedpipe_core.planning_problem import Cell, EdgeProblem, IntArray, RoundTerms
from fedpipe_core.planning_utility import FloatArray, worth

DIRECTIONS = np.linspace(0.0, 1.0, 6)  # share of memory, against seconds, in what an item costs
MAGNITUDES = 48  # multipliers per direction, spread over the items' efficiencies
ROUNDING = 1e-9  # relative slack of a budget for sums of floats
INDIFFERENCE = 1e-3  # of its worth: plans this close to the best count as equal, and the cell's preference decides
FILLED = 8  # most promising cells whose best selection is filled up


@dataclass(frozen=True)
class Selection:
    """A cell, the lowest block as an index into `blocks`, steps, and a column of `ranks` per module (-1: none)."""

    cell: Cell
    block: int
    steps: int
    choice: IntArray
    utility: float = 0.0
    value: float = 0.0  # worth − the cell's loss − penalty·u

    @property
    def worth(self) -> float:
        """What the utility counts for."""
        return float(worth(self.utility))


@dataclass(frozen=True)
class Duals:
    """The multipliers of a sweep, (pairs, 2), and Σ max(0, utility − μ·bytes − λ·seconds), (pairs, blocks)."""

    multipliers: FloatArray
    reduced_utility: FloatArray


@dataclass(frozen=True)
class Sweep:
    """The answers to every pair of multipliers, shared by the cells that differ in bits only; (pairs, blocks)."""

    duals: Duals
    utility: FloatArray
    memory: FloatArray
    seconds: FloatArray
    upload_seconds: FloatArray


@dataclass(frozen=True)
class Frontier:
    """Selections that fit the memory and are not beaten in both step seconds and value, over all cells; flat arrays."""

    cell: IntArray
    block: IntArray
    pair: IntArray
    value: FloatArray  # without the under-training penalty
    step_seconds: FloatArray
    fixed_seconds: FloatArray
    planned_steps: IntArray
    least_steps: IntArray
    share_per_step: FloatArray


def sweep_cells(problem: EdgeProblem) -> list[Sweep]:
    """One sweep per cell, computed once for cells that differ in bits only."""
    sweeps: dict[tuple[int, bool], Sweep] = {}
    for cell in problem.cells:
        key = (cell.batch_size, cell.checkpointing)
        if key not in sweeps:
            sweeps[key] = _sweep(problem, cell)
    return [sweeps[cell.batch_size, cell.checkpointing] for cell in problem.cells]


def best_columns(problem: EdgeProblem, cell: Cell, multipliers: FloatArray) -> tuple[IntArray, FloatArray]:
    """Per pair of multipliers and module the best column of `ranks` (-1: none) and its reduced utility."""
    memory, seconds = multipliers[:, 0, None, None], multipliers[:, 1, None, None]
    reduced = problem.utility - memory * cell.item_memory - seconds * step_seconds(cell)
    columns = reduced.argmax(axis=2)
    best = np.take_along_axis(reduced, columns[..., None], axis=2)[..., 0]
    return np.where(best > 0, columns, -1), np.maximum(best, 0.0)


def step_seconds(cell: Cell) -> FloatArray:
    """Seconds per step of each item, its upload spread over the planned steps."""
    return cell.item_seconds + cell.item_upload_seconds / cell.planned_steps


def frontier(problem: EdgeProblem, sweeps: Sequence[Sweep]) -> Frontier:
    """All selections of the sweeps worth considering at some deadline."""
    parts = [_cell_frontier(problem, i, s) for i, s in enumerate(sweeps)]
    return Frontier(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def values_at(front: Frontier, terms: RoundTerms) -> FloatArray:
    """Value of every selection under a deadline, −inf where not even its least steps fit."""
    steps = steps_within(front, terms.seconds)
    under_training = np.maximum(0.0, 1.0 - steps * front.share_per_step)
    return np.where(steps >= front.least_steps, front.value - terms.penalty * under_training, -np.inf)


def steps_within(front: Frontier, round_seconds: float) -> IntArray:
    """Local steps of every selection that fit a deadline, at most the planned ones."""
    available = (round_seconds * (1 + ROUNDING) - front.fixed_seconds) / front.step_seconds
    return np.minimum(np.floor(available), front.planned_steps).astype(np.int64)


def solve_greedily(problem: EdgeProblem, duals: Sequence[Duals], front: Frontier, terms: RoundTerms) -> Selection:
    """The best selection of the frontier after filling both budgets. The frontier must have one that fits."""
    values, steps = values_at(front, terms), steps_within(front, terms.seconds)
    selections = []
    for i in _most_promising(front, values):
        cell = problem.cells[front.cell[i]]
        choice = _choice_of(problem, cell, duals[front.cell[i]], int(front.pair[i]), int(front.block[i]))
        start = Selection(cell, int(front.block[i]), int(steps[i]), choice)
        selections.append(fill(problem, start, terms))
    return preferred(selections)


def _most_promising(front: Frontier, values: FloatArray) -> IntArray:
    """The best selection of each of the best few cells: plans of equal value differ in their cells."""
    ranked = np.lexsort((front.cell, -values))
    first_of_cell = np.sort(np.unique(front.cell[ranked], return_index=True)[1])[:FILLED]
    best = ranked[first_of_cell]
    return best[np.isfinite(values[best])]


def preferred(selections: Iterable[Selection]) -> Selection:
    """The most valuable selection; among those within `INDIFFERENCE` of it, the one its cell prefers."""
    ranked = sorted(selections, key=lambda s: -s.value)
    equal = [s for s in ranked if s.value >= ranked[0].value - INDIFFERENCE * ranked[0].worth]
    return min(equal, key=lambda s: (s.cell.preference, -s.value))


def fill(problem: EdgeProblem, selection: Selection, terms: RoundTerms) -> Selection:
    """Spend what is left of both budgets: raise ranks by the largest utility that fits, then add steps."""
    cell, choice = selection.cell, selection.choice.copy()
    memory, seconds = slacks(problem, selection, terms.seconds)
    per_round = cell.item_upload_seconds + selection.steps * cell.item_seconds
    reached = np.arange(len(choice)) < problem.modules_reached[selection.block]
    while len(choice):
        gain = problem.utility - _current(problem.utility, choice)[:, None]
        more_memory = cell.item_memory - _current(cell.item_memory, choice)[:, None]
        more_seconds = per_round - _current(per_round, choice)[:, None]
        fits = (more_memory <= memory) & (more_seconds <= seconds) & reached[:, None]
        gain = np.where(fits, gain, 0.0)
        module, column = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[module, column] <= ROUNDING:
            break
        memory, seconds = memory - more_memory[module, column], seconds - more_seconds[module, column]
        choice[module] = column
    return price(problem, Selection(cell, selection.block, selection.steps, choice), terms)


def slacks(problem: EdgeProblem, selection: Selection, round_seconds: float) -> tuple[float, float]:
    """Bytes and seconds of the round that a selection leaves unused."""
    cell, choice = selection.cell, selection.choice
    memory = cell.block_memory[selection.block] + _current(cell.item_memory, choice).sum()
    fixed = cell.idle_seconds + _current(cell.item_upload_seconds, choice).sum()
    spent = fixed + selection.steps * seconds_per_step(selection)
    return problem.memory_bytes - float(memory), round_seconds - float(spent)


def seconds_per_step(selection: Selection) -> float:
    """What one optimizer step of a selection takes."""
    cell = selection.cell
    return float(cell.block_seconds[selection.block] + _current(cell.item_seconds, selection.choice).sum())


def steps_by(problem: EdgeProblem, selection: Selection, round_seconds: float) -> int:
    """Steps that a selection can make by the end of a round, however many are planned; never fewer than it has."""
    slack_seconds = slacks(problem, selection, round_seconds)[1] + ROUNDING * round_seconds
    return selection.steps + max(0, int(slack_seconds // seconds_per_step(selection)))


def price(problem: EdgeProblem, selection: Selection, terms: RoundTerms) -> Selection:
    """The selection with all the steps that fit, its utility and its value."""
    cell, choice = selection.cell, selection.choice
    steps = min(cell.planned_steps, steps_by(problem, selection, terms.seconds))
    utility = problem.pinned_utility + float(_current(problem.utility, choice).sum())
    return Selection(cell, selection.block, steps, choice, utility, float(value_of(cell, utility, steps, terms)))


def value_of(cell: Cell, utility: ArrayLike, steps: ArrayLike, terms: RoundTerms) -> FloatArray:
    """Worth of a utility − the cell's loss − penalty·u after that many steps; it never falls with the utility."""
    under_training = np.maximum(0.0, 1.0 - np.asarray(steps) * cell.share_per_step)
    return worth(utility) - cell.loss - terms.penalty * under_training


def _current(table: FloatArray, choice: IntArray) -> FloatArray:
    """Each module's entry at its chosen column, 0 where it has none."""
    return np.where(choice >= 0, table[np.arange(len(choice)), choice], 0.0)


def _choice_of(problem: EdgeProblem, cell: Cell, duals: Duals, pair: int, block: int) -> IntArray:
    modules = np.arange(len(problem.modules))
    if pair < 0:
        return np.where(modules == -1 - pair, 0, -1)
    if not len(modules):
        return modules
    columns = best_columns(problem, cell, duals.multipliers[pair, None])[0][0]
    return np.where(modules < problem.modules_reached[block], columns, -1)


def _sweep(problem: EdgeProblem, cell: Cell) -> Sweep:
    if not problem.modules:
        zero = np.zeros((1, 1))
        return Sweep(Duals(np.zeros((1, 2)), zero), zero, zero, zero, zero)
    pairs = _multipliers(problem.utility, cell.item_memory, step_seconds(cell))
    chosen = [best_columns(problem, cell, part) for part in np.split(pairs, len(DIRECTIONS))]  # parts stay in cache
    columns, dual = (np.concatenate(arrays) for arrays in zip(*chosen, strict=True))
    tables = (problem.utility, cell.item_memory, cell.item_seconds, cell.item_upload_seconds)
    rows = np.arange(len(problem.modules))
    taken = [np.where(columns >= 0, table[rows, columns], 0.0) for table in tables]
    reached = np.asarray(problem.modules_reached) - 1
    reduced, *totals = (np.cumsum(values, axis=1)[:, reached] for values in (dual, *taken))
    return Sweep(Duals(pairs, reduced), *totals)


def _multipliers(utility: FloatArray, memory: FloatArray, seconds: FloatArray) -> FloatArray:
    """Pairs (μ, λ): per direction 0 and magnitudes that span what a further rank gains per unit of cost."""
    pairs = []
    for share in DIRECTIONS:
        memory_weight, seconds_weight = share / max(memory.max(), 1.0), (1 - share) / max(seconds.max(), 1e-12)
        cost = memory_weight * memory + seconds_weight * seconds
        gained, spent = np.diff(utility, prepend=0.0), np.diff(cost, prepend=0.0)
        efficiencies = (gained / np.maximum(spent, 1e-12))[gained > 0]
        magnitudes = np.geomspace(efficiencies.min(), efficiencies.max(), MAGNITUDES - 1)
        pairs.append(np.concatenate([[0.0], magnitudes])[:, None] * [memory_weight, seconds_weight])
    return np.concatenate(pairs)


def _cell_frontier(problem: EdgeProblem, index: int, swept: Sweep) -> tuple[NDArray[np.generic], ...]:
    cell = problem.cells[index]
    parts = [_swept_selections(problem, cell, swept), _single_adapters(problem, cell)]
    pair, block, utility, memory, step, upload = (np.concatenate(column) for column in zip(*parts, strict=True))
    step, fixed = step + cell.block_seconds[block], upload + cell.idle_seconds
    fitting = np.flatnonzero(cell.block_memory[block] + memory <= problem.memory_bytes)
    value = worth(utility + problem.pinned_utility) - cell.loss
    kept = fitting[_undominated((step + fixed / cell.planned_steps)[fitting], value[fitting])]
    rows = np.ones(len(kept), dtype=np.int64)
    return (
        index * rows,
        block[kept],
        pair[kept],
        value[kept],
        step[kept],
        fixed[kept],
        cell.planned_steps * rows,
        cell.least_steps * rows,
        cell.share_per_step * rows,
    )


def _swept_selections(problem: EdgeProblem, cell: Cell, swept: Sweep) -> tuple[NDArray[np.generic], ...]:
    pair, block = np.nonzero((swept.utility > 0) | bool(problem.pinned_ranks))
    tables = (swept.utility, swept.memory, swept.seconds, swept.upload_seconds)
    return (pair, block, *(table[pair, block] for table in tables))


def _single_adapters(problem: EdgeProblem, cell: Cell) -> tuple[NDArray[np.generic], ...]:
    """One module at its smallest rank: what is left when nothing more fits. Its pair is −1 − module."""
    module = np.arange(len(problem.modules))
    tables = (problem.utility, cell.item_memory, cell.item_seconds, cell.item_upload_seconds)
    return (-1 - module, problem.block_of_module, *(table[:, 0] for table in tables))


def _undominated(seconds: FloatArray, value: FloatArray) -> IntArray:
    """Indices of entries that no entry of fewer or equal seconds beats in value."""
    order = np.lexsort((-value, seconds))
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], value[order]]))[:-1]
    return order[value[order] > best_before]
